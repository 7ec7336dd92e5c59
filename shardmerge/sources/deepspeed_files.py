"""The files of a DeepSpeed tag directory, told apart by name (``runtime/engine.py``, ``checkpoint/constants.py``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from shardmerge.errors import CheckpointError, raise_all

# Which numbers: the weights that the optimizer keeps, the 16-bit ones that the model computed with, a moment of Adam.
DeepSpeedView: TypeAlias = Literal["fp32", "module", "exp_avg", "exp_avg_sq"]
VIEWS: tuple[DeepSpeedView, ...] = get_args(DeepSpeedView)

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_.*_optim_states\.pt")
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
class TagFiles:
    """Model and optimizer files, each in numeric rank order (rank 10 after rank 9), and what a pipeline has instead.

    Attributes
    ----------
    layers
        Of a pipeline: its layer files by their numbers, in ascending order.
    universal
        Whether the optimizer's tensors lie in ``zero/``, each in a file of its own.
    """

    models: tuple[DeepSpeedRankFile, ...]
    optims: tuple[DeepSpeedRankFile, ...]
    layers: Mapping[int, Path]
    universal: bool

    @property
    def model_parallel(self) -> int:
        """The largest model-parallel rank in a name."""
        return max(file.model_parallel for file in (*self.models, *self.optims))


def is_tag_folder(folder: Path) -> bool:
    """Tells whether a directory holds DeepSpeed state files or is a universal checkpoint."""
    return is_universal(folder) or any(_kind(path.name) for path in folder.glob("*_states.pt"))


def tag_of(path: Path) -> Path | None:
    """Returns the tag directory that a file is of, by its name or by ``zero/`` around it; None for any other file."""
    return path.parent if _kind(path.name) else universal_of(path) if path.suffix == ".pt" else None


def universal_of(path: Path) -> Path | None:
    """Returns the universal checkpoint that a path lies in: ``zero/``, a parameter there, a file of one; else None."""
    zero = next((folder for folder in (path, *path.parents[:2]) if folder.name == "zero"), None)
    return zero.parent if zero and is_universal(zero.parent) else None


def has_layers(folder: Path) -> bool:
    """Tells whether a directory holds layer files of a pipeline, or of one with experts."""
    return any(_kind(path.name) == "layer" for path in folder.glob("layer_*_states.pt"))


def list_tag(folder: Path) -> TagFiles:
    """Returns the rank files of a tag directory.

    Raises
    ------
    CheckpointError
        ``kind-not-yet`` for layouts with experts, or with layers that are cut;
        ``missing-rank`` when there is no model file at all; ``mixed-runs`` when a rank has two files of a kind.
    """
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*_states.pt")):
        kinds.setdefault(_kind(path.name), []).append(path)
    models = _ranks(kinds.get("model", []), _MODEL)
    optims = _ranks(kinds.get("optim", []), _OPTIM)
    if "expert" in kinds:
        raise kind_not_yet(folder, "mixture-of-experts (MoE)")
    raise_all(_twice(folder, models, optims))
    if not models:
        raise CheckpointError(
            "missing-rank",
            "the directory has optimizer files and no model file",
            where=str(folder),
            expected="mp_rank_00_model_states.pt or zero_pp_rank_*_mp_rank_00_model_states.pt",
            hint="rank 0 writes it: gather the files of all nodes in one directory",
        )
    return TagFiles(models, optims, _layers(folder, kinds.get("layer", [])), is_universal(folder))


def is_universal(folder: Path) -> bool:
    """Tells whether a directory is a universal checkpoint, as ``ds_to_universal`` writes it."""
    return (folder / "zero").is_dir() and any(folder.glob("*_model_states.pt"))


def model_name(rank: int) -> str:
    """Returns the name of a rank's model file in stage 3."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def stage_name(stage: int) -> str:
    """Returns the name of the model file of a pipeline stage, or of the only one there is below stage 3."""
    return f"mp_rank_{stage:02d}_model_states.pt"


def layer_name(layer: int) -> str:
    """Returns the name of the file of a pipeline's layer."""
    return f"layer_{layer:02d}-model_states.pt"


def optim_name(rank: int, *, bf16: bool, stage: int = 0) -> str:
    """Returns the name of a rank's optimizer file; ``stage`` is that of a pipeline."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_{stage:02d}_optim_states.pt"


def consolidated(folder: Path) -> Path | None:
    """Returns a file beside a tag directory, or in it, that by its name holds a whole model; ``None`` without one."""
    places = (place / name for place in (folder.parent, folder) for name in _WHOLE)
    return next((path for path in places if path.is_file()), None)


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"(?:rank|layer)_(\d+)", name))


def _kind(name: str) -> str:
    patterns = (("expert", _EXPERT), ("layer", _LAYER), ("optim", _OPTIM), ("model", _MODEL))
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


def kind_not_yet(folder: Path, kind: str, found: str = "") -> CheckpointError:
    """Returns the error for a layout that is recognised and not read."""
    return CheckpointError(
        "kind-not-yet",
        f"this is a {kind} DeepSpeed checkpoint, which shardmerge does not read yet",
        where=str(folder),
        found=found,
        expected="ZeRO stages 0 to 3, universal checkpoints and pipelines, without tensor parallelism",
    )
