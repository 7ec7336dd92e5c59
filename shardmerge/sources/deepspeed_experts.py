"""Mixture of experts in a DeepSpeed checkpoint: the files of single experts, and the ranks that share their masters.

``layer_L_expert_E_mp_rank_00_model_states.pt`` holds one expert of one layer in 16 bits, under names with its number in
the model (``runtime/engine.py``, ``_save_moe_checkpoint``, 0.9 to 0.19). The partitions have the numbers of a rank:
where E experts are spread over P ranks, local expert 0 of the second of them is expert E/P. The masters of these are
cut over the ranks that hold the same ones: every P-th rank, or with ``use_data_before_expert_parallelism`` those beside
each other (``utils/groups.py``, ``_create_expert_and_data_parallel``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from shardmerge.errors import CheckpointError, raise_all
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_claims import settings_of
from shardmerge.sources.deepspeed_files import ExpertFile, expert_name
from shardmerge.sources.deepspeed_ranks import OptimState, named_tensors
from shardmerge.sources.deepspeed_values import Stored
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import read_torch_file
from shardmerge.tensors import FileStamp, Shape

_NUMBER = re.compile(r"(?P<layer>.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(?P<expert>\d{1,9})\.(?P<rest>.*)")
_MOST_NAMED = 5
# Thirty times the experts of the largest models, all layers together.
_MOST_EXPERTS = 1 << 20


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The experts of all layers.

    Attributes
    ----------
    tensors
        Their 16-bit weights, by name in the whole model.
    counts
        Experts of a layer, by what stands before their numbers in names.
    stamps
        Of the files.
    data_first
        Whether ranks beside each other hold the same experts.
    """

    tensors: Mapping[str, Stored]
    counts: Mapping[str, int]
    stamps: tuple[FileStamp, ...]
    data_first: bool

    def sharing(self, optims: Sequence[OptimState], part: int, parts: int) -> Sequence[OptimState]:
        """Returns the ranks that share the masters of one of several equal parts of the experts, in their order."""
        each = len(optims) // parts
        return optims[part * each : (part + 1) * each] if self.data_first else optims[part::parts]

    def whole_name(self, name: str, part: int, parts: int) -> str | None:
        """Returns the name in the whole model of a parameter of a rank that holds one of several parts of the experts.

        ``None`` where the files of the experts have no such parameter.
        """
        match = _NUMBER.fullmatch(name)
        count = self.counts.get(match["layer"], 0) if match else 0
        if match is None or count % parts or int(match["expert"]) >= count // parts:
            return None
        found = f"{match['layer']}{part * (count // parts) + int(match['expert'])}.{match['rest']}"
        return found if found in self.tensors else None


def is_expert(name: str) -> bool:
    """Tells whether a parameter is one of an expert's."""
    return _NUMBER.fullmatch(name) is not None


def data_before_experts(roots: Iterable[Mapping[object, PickleValue]]) -> bool:
    """Tells whether ranks beside each other hold the same experts; the config is in the one file or the other."""
    configs = (settings_of(root.get("ds_config")) or {} for root in roots)
    return any(config.get("use_data_before_expert_parallelism") is True for config in configs)


def read_experts(folder: Path, files: Sequence[ExpertFile], stated: PickleValue, *, data_first: bool) -> ExpertWeights:
    """Returns the experts of a checkpoint.

    Parameters
    ----------
    folder
        The tag directory.
    files
        Those of single experts.
    stated
        ``num_experts`` of the model file: of each layer in the model's order.
    data_first
        As in ``Experts``.

    Raises
    ------
    CheckpointError
        ``missing-rank``: files of experts are not there. ``mixed-runs``: there are more, one holds another expert, or
        the experts of a layer are not alike. And what the torch reader raises.
    """
    counts = [count for count in stated if isinstance(count, int)] if isinstance(stated, list) else []
    raise_all(_incomplete(folder, files, counts))
    tensors: dict[str, Stored] = {}
    layers: dict[str, int] = {}
    stamps: list[FileStamp] = []
    forms: dict[int, tuple[str, object]] = {}
    for file in files:
        torch_file = read_torch_file(file.path)
        found = named_tensors(torch_file.root)
        layer, form = _form(file, {name: ref.shape for name, ref in found.items()})
        if forms.setdefault(file.layer, (layer, form)) != (layer, form):
            raise _odd(file, "the experts of a layer are not alike", f"{layer} {shown(form)}", shown(forms[file.layer]))
        if layers.setdefault(layer, file.layer) != file.layer:
            raise _odd(file, "two layers of experts have one name", layer)
        tensors |= {name: Stored(torch_file, ref) for name, ref in found.items()}
        stamps.append(torch_file.stamp)
    by_layer = {layer: counts[number] for layer, number in layers.items()}
    return ExpertWeights(tensors, by_layer, tuple(stamps), data_first)


def check_expert_optims(folder: Path, paths: Sequence[Path]) -> None:
    """Raises ``missing-rank`` where there is no file of partitions and the optimizer of the experts says it was ZeRO's.

    Up to DeepSpeed 0.16 the model file of such a run says nothing of its optimizer.
    """
    for path in paths[:1]:
        root = as_dict(read_torch_file(path).root)
        if "optimizer" in root and root["optimizer"] is None:
            raise CheckpointError(
                "missing-rank",
                "there are no optimizer files",
                where=str(folder),
                found=f"{path.name}, which leaves the optimizer to ZeRO's files",
                expected="zero_pp_rank_*_mp_rank_00_optim_states.pt, one a rank",
                hint="every node writes its own ranks: gather the files of all nodes in one directory; "
                "or take the 16-bit weights of the model file alone: --view module (in a mapping, `view: module`)",
            )


def _incomplete(folder: Path, files: Sequence[ExpertFile], counts: Sequence[int]) -> Iterator[CheckpointError]:
    there = {(file.layer, file.expert) for file in files}
    total = sum(count for count in counts if count > 0)
    if total > _MOST_EXPERTS or total < len(there) or not total:
        yield CheckpointError(
            "mixed-runs",
            "the directory holds other experts than the model file states",
            where=str(folder),
            found=f"{len(there)} files of experts",
            expected=f"{shown(list(counts))} experts, layer by layer",
            hint="files of two runs are mixed: copy the files of one save into a directory of their own",
        )
        return
    wanted = ((layer, expert) for layer, count in enumerate(counts) for expert in range(count))
    missing = list(islice((key for key in wanted if key not in there), _MOST_NAMED))
    if missing:
        yield CheckpointError(
            "missing-rank",
            f"files of experts are missing: {', '.join(expert_name(*key) for key in missing)}",
            where=str(folder),
            found=f"{len(there)} files",
            expected=f"{total} files, one an expert: {shown(list(counts))} layer by layer",
            hint="every node writes its own experts: gather the files of all nodes in one directory",
        )


def _form(file: ExpertFile, shapes: Mapping[str, Shape]) -> tuple[str, tuple[tuple[str, Shape], ...]]:
    """Returns the layer's name and the tensors of an expert, which are those of its layer's other experts, too."""
    matches = [(match, shape) for name, shape in shapes.items() if (match := _NUMBER.fullmatch(name))]
    layers = {match["layer"] for match, _ in matches}
    numbers = {int(match["expert"]) for match, _ in matches}
    if (0,) in shapes.values():
        raise _odd(file, "a file of an expert has no data", shown(list(shapes)), "tensors with elements")
    if len(matches) != len(shapes) or len(layers) != 1 or numbers != {file.expert}:
        raise _odd(file, "a file of an expert holds another", shown(list(shapes)), f"expert {file.expert} of one layer")
    return layers.pop(), tuple((match["rest"], shape) for match, shape in matches)


def _odd(file: ExpertFile, what: str, found: str, expected: str = "") -> CheckpointError:
    hint = "files were renamed, swapped, or are of two saves: copy the save anew"
    return CheckpointError("mixed-runs", what, where=str(file.path), found=found, expected=expected, hint=hint)
