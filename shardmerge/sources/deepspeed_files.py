"""The files of a DeepSpeed tag directory, told apart by name (``runtime/engine.py``, ``checkpoint/constants.py``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from shardmerge.errors import CheckpointError, raise_all
from shardmerge.storage.listing import matching

# Which numbers: the weights that the optimizer keeps, the 16-bit ones that the model computed with, a moment of Adam.
DeepSpeedView: TypeAlias = Literal["fp32", "module", "exp_avg", "exp_avg_sq"]
VIEWS: tuple[DeepSpeedView, ...] = get_args(DeepSpeedView)
# Those of an optimizer.
MOMENTS: tuple[DeepSpeedView, ...] = ("exp_avg", "exp_avg_sq")

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_EXPERT = re.compile(r"(?:layer_(?P<layer>\d{1,9})_)?expert_(?P<expert>\d{1,9})_mp_rank_(?P<mp>\d+)_model_states\.pt")
# The optimizer of the ranks that hold some of the experts, where it is none of ZeRO's.
_EXPERT_OPTIM = re.compile(r"expp_rank_\d+_mp_rank_\d+_optim_states\.pt")
# What `zero_to_fp32.py`, `save_pretrained` and `save_16bit_model` call a whole model.
_WHOLE = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip
_LAYER = re.compile(r"layer_(?P<layer>\d+)-(?:model_(?P<tp>\d+)-)?model_states\.pt")


@dataclass(frozen=True, slots=True)
class DeepSpeedRankFile:
    """A file of one rank.

    Attributes
    ----------
    data_parallel, model_parallel
        The two ranks in its name; 0 where the name has none.
    """

    path: Path
    data_parallel: int
    model_parallel: int

    @property
    def partitioned(self) -> bool:
        """Whether a model file's name is one of stage 3, where every rank writes its own."""
        return self.path.name.startswith("zero_pp_rank_")

    def saved_as(self, archive: str) -> str:
        """Returns the name that the file was saved under, if that is another rank's or another kind's; else ``""``.

        ``torch.save`` keeps the name of the file inside it; ``archive`` is that, without the ending.
        """
        name = f"{archive}.pt"
        there, here = _kind(name), _kind(self.path.name)
        return name if there and (there, _numbers(name)) != (here, _numbers(self.path.name)) else ""


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """The file of one expert of one layer, by their numbers in the model."""

    path: Path
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class TagFiles:
    """Model and optimizer files, each in numeric rank order (rank 10 after rank 9), and what is beside them.

    Attributes
    ----------
    layers
        Of a pipeline: its layer files by their numbers, in ascending order.
    universal
        Whether the optimizer's tensors lie in ``zero/``, each in a file of its own.
    experts, expert_optims
        Of a mixture of experts: a file for each expert, and the optimizers of the ranks that hold some of them.
    """

    models: tuple[DeepSpeedRankFile, ...]
    optims: tuple[DeepSpeedRankFile, ...]
    layers: Mapping[int, Path]
    universal: bool
    experts: tuple[ExpertFile, ...]
    expert_optims: tuple[Path, ...]

    @property
    def parallel(self) -> list[int]:
        """The model-parallel ranks that have a file, in order."""
        return sorted({file.model_parallel for file in (*self.models, *self.optims)})

    def of_rank(self, parallel: int) -> TagFiles:
        """Returns the files of one model-parallel rank."""
        models, optims = (
            tuple(file for file in files if file.model_parallel == parallel) for files in (self.models, self.optims)
        )
        return replace(self, models=models, optims=optims)


def is_tag_folder(folder: Path) -> bool:
    """Tells whether a directory holds DeepSpeed state files or is a universal checkpoint."""
    return is_universal(folder) or any(_kind(path.name) for path in matching(folder, "*_states.pt"))


def tag_of(path: Path) -> Path | None:
    """Returns the tag directory that a file is of, by its name or by ``zero/`` around it; None for any other file."""
    return path.parent if _kind(path.name) else universal_of(path) if path.suffix == ".pt" else None


def universal_of(path: Path) -> Path | None:
    """Returns the universal checkpoint that a path lies in: ``zero/``, a parameter there, a file of one; else None."""
    zero = next((folder for folder in (path, *path.parents[:2]) if folder.name == "zero"), None)
    return zero.parent if zero and is_universal(zero.parent) else None


def list_tag(folder: Path) -> TagFiles:
    """Returns the rank files of a tag directory.

    Raises
    ------
    CheckpointError
        ``kind-not-yet`` for experts without a layer's number, and for experts or layers that are cut;
        ``missing-rank`` when there is no model file at all; ``mixed-runs`` when a rank has two files of a kind.
    """
    kinds: dict[str, list[Path]] = {}
    for path in matching(folder, "*_states.pt"):
        kinds.setdefault(_kind(path.name), []).append(path)
    models = _ranks(kinds.get("model", []), _MODEL)
    optims = _ranks(kinds.get("optim", []), _OPTIM)
    experts = _experts(folder, kinds.get("expert", []))
    layers = _layers(folder, kinds.get("layer", []))
    raise_all(_twice(folder, models, optims))
    if not models:
        raise CheckpointError(
            "missing-rank",
            "the directory has optimizer files and no model file",
            where=str(folder),
            expected="mp_rank_00_model_states.pt or zero_pp_rank_*_mp_rank_00_model_states.pt",
            hint="rank 0 writes it: gather the files of all nodes in one directory",
        )
    return TagFiles(models, optims, layers, is_universal(folder), experts, tuple(kinds.get("expp", [])))


def is_universal(folder: Path) -> bool:
    """Tells whether a directory is a universal checkpoint, as ``ds_to_universal`` writes it."""
    return (folder / "zero").is_dir() and bool(matching(folder, "*_model_states.pt"))


def model_name(rank: int, parallel: int = 0) -> str:
    """Returns the name of a rank's model file in stage 3."""
    return f"zero_pp_rank_{rank}_mp_rank_{parallel:02d}_model_states.pt"


def optim_name(rank: int, parallel: int = 0, *, bf16: bool) -> str:
    """Returns the name of a rank's optimizer file; ``parallel`` is the tensor parallel rank, or the pipeline stage."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_{parallel:02d}_optim_states.pt"


def model_file(parallel: int, *, partitioned: bool) -> str:
    """Returns the name of the first model file of a model-parallel rank; in stage 3 there is one a data rank."""
    return model_name(0, parallel) if partitioned else f"mp_rank_{parallel:02d}_model_states.pt"


def layer_name(layer: int) -> str:
    """Returns the name of the file of a pipeline's layer."""
    return f"layer_{layer:02d}-model_states.pt"


def expert_name(layer: int, expert: int) -> str:
    """Returns the name of an expert's file."""
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


def consolidated(folder: Path) -> Path | None:
    """Returns a file beside a tag directory, or in it, that by its name holds a whole model; ``None`` without one."""
    places = (place / name for place in (folder.parent, folder) for name in _WHOLE)
    return next((path for path in places if path.is_file()), None)


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"(?:rank|layer)_(\d+)", name))


def _kind(name: str) -> str:
    patterns = (("expert", _EXPERT), ("expp", _EXPERT_OPTIM), ("layer", _LAYER), ("optim", _OPTIM), ("model", _MODEL))
    return next((kind for kind, pattern in patterns if pattern.fullmatch(name)), "")


def _ranks(paths: list[Path], pattern: re.Pattern[str]) -> tuple[DeepSpeedRankFile, ...]:
    found = []
    for path in paths:
        match = pattern.fullmatch(path.name)
        if match:
            found.append(DeepSpeedRankFile(path, int(match["dp"] or 0), int(match["mp"])))
    return tuple(sorted(found, key=lambda rank: (rank.model_parallel, rank.data_parallel)))


def _twice(folder: Path, *sets: tuple[DeepSpeedRankFile, ...]) -> Iterator[CheckpointError]:
    """Two files for one rank: those of another stage, or with and without ``bf16_``, in one directory."""
    for files in sets:
        known: dict[tuple[int, int], DeepSpeedRankFile] = {}
        for file in files:
            other = known.setdefault((file.model_parallel, file.data_parallel), file)
            if other is not file:
                yield CheckpointError(
                    "mixed-runs",
                    f"two files are those of rank {file.data_parallel}",
                    where=str(folder),
                    found=f"{other.path.name} and {file.path.name}",
                    hint="they are of two saves, with other settings: move the files of one of them elsewhere",
                )


def _layers(folder: Path, paths: list[Path]) -> dict[int, Path]:
    """Returns the layer files by number; a pipeline whose layers are cut has several for one of them."""
    found: dict[int, Path] = {}
    for path in paths:
        match = _LAYER.fullmatch(path.name)
        assert match is not None
        number = int(match["layer"])
        if int(match["tp"] or 0) or number in found:
            raise kind_not_yet(folder, "pipeline- and tensor-parallel", path.name)
        found[number] = path
    return dict(sorted(found.items()))


def _experts(folder: Path, paths: list[Path]) -> tuple[ExpertFile, ...]:
    found = []
    for path in paths:
        match = _EXPERT.fullmatch(path.name)
        assert match is not None  # it is of this kind
        if match["layer"] is None:
            raise kind_not_yet(folder, "mixture-of-experts (MoE) of an early form", path.name)
        if int(match["mp"]):
            raise kind_not_yet(folder, "tensor-parallel mixture-of-experts (MoE)", path.name)
        found.append(ExpertFile(path, int(match["layer"]), int(match["expert"])))
    return tuple(sorted(found, key=lambda file: (file.layer, file.expert)))


def kind_not_yet(folder: Path, kind: str, found: str = "") -> CheckpointError:
    """Returns the error for a layout that is recognised and not read."""
    return CheckpointError(
        "kind-not-yet",
        f"this is a {kind} DeepSpeed checkpoint, which shardmerge does not read yet",
        where=str(folder),
        found=found,
        expected="ZeRO stages 0 to 3 with experts, tensor parallelism or a pipeline; universal of ZeRO or a pipeline",
    )
