"""Megatron-core checkpoints of format ``torch``: ``iter_NNNNNNN/mp_rank_TT[_PPP]/model_optim_rng.pt``.

Folder and file names are those of ``megatron/training/checkpointing.py`` (``get_checkpoint_name``, and the tracker file
of ``get_checkpoint_tracker_filename``); a pipeline number stands in them only where there are stages, an expert number
only where there are experts. A tensor of tensor rank 1 in pipeline stage 2 is called ``01.002.name``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_values import Opaque, PickleValue
from shardmerge.sources.rank_files import FILES, MegatronRankFile, list_ranks
from shardmerge.sources.rank_sets import check_same_names, missing_ranks, ranks_in_words, stack_ranks
from shardmerge.sources.state_dict import StateDict, state_dict
from shardmerge.sources.torch_checkpoint import as_dict, torch_catalog
from shardmerge.sources.torch_file import TorchFile, read_torch_file
from shardmerge.tensors import Catalog, Fact

_MOST_NAMED = 5
_VIRTUAL = re.compile(r"model\d+")

_CONVERT = (
    "let Megatron's tools/checkpoint/convert.py write it with --target-pipeline-parallel-size 1"
    " --target-tensor-parallel-size 1, and pass the result"
)


def read_megatron(folder: Path) -> Catalog:
    """Returns the catalog of one iteration: all tensor ranks and pipeline stages.

    Raises
    ------
    CheckpointError
        ``kind-not-yet``: virtual pipeline stages, or experts. ``missing-rank``,
        ``mixed-ranks``: the files are not those of one whole model. And what the torch reader raises.
    """
    ranks = list_ranks(folder)
    _check_experts(folder, ranks)
    catalogs: dict[MegatronRankFile, Catalog] = {}
    facts: dict[str, Fact] = {}
    skipped: list[str] = []
    for rank in ranks:
        file = read_torch_file(rank.path)
        found = _model(file)
        skipped += found.skipped
        catalogs[rank] = torch_catalog(file, found)
        if not facts:
            facts = scalars(as_dict(file.root).get("args"))
            _check_arguments(folder, ranks, facts)
    for stage in sorted({rank.stage for rank in ranks}):
        check_same_names(folder, {_prefix(rank): catalogs[rank] for rank in ranks if rank.stage == stage})
    named = {_prefix(rank): catalog for rank, catalog in catalogs.items()}
    catalog = stack_ranks(folder, _kind(ranks), named, facts)
    return replace(catalog, notes=(*catalog.notes, *_left_out(skipped)))


def _model(file: TorchFile) -> StateDict:
    virtual = [str(key) for key in as_dict(file.root) if _VIRTUAL.fullmatch(str(key))]
    if virtual:
        raise CheckpointError(
            "kind-not-yet",
            "this checkpoint has virtual pipeline stages, which shardmerge does not read yet",
            where=file.path,
            found=", ".join(virtual[:8]),
            expected="one state dict, under the key model",
            hint=_CONVERT,
        )
    return state_dict(file.root, key="model")


def scalars(arguments: PickleValue) -> dict[str, Fact]:
    """Returns the plain values of an ``argparse.Namespace``, which pickles as its dict."""
    values = arguments.state if isinstance(arguments, Opaque) else arguments
    return {
        name: value
        for name, value in as_dict(values).items()
        if isinstance(name, str) and isinstance(value, bool | int | float | str)
    }


def _check_experts(folder: Path, ranks: list[MegatronRankFile]) -> None:
    if any(rank.experts for rank in ranks):
        raise _experts_not_yet(folder)


def _experts_not_yet(folder: Path) -> CheckpointError:
    return CheckpointError(
        "kind-not-yet",
        "this checkpoint has expert-parallel ranks, which shardmerge does not read yet",
        where=str(folder),
        hint="let Megatron's tools/checkpoint/convert.py write it with --target-expert-parallel-size 1",
    )


def _check_arguments(folder: Path, ranks: list[MegatronRankFile], facts: Mapping[str, Fact]) -> None:
    experts = facts.get("expert_model_parallel_size")
    if isinstance(experts, int) and experts > 1:
        raise _experts_not_yet(folder)
    _check_grid(folder, ranks, facts)


def _check_grid(folder: Path, ranks: list[MegatronRankFile], facts: Mapping[str, Fact]) -> None:
    """Checks that every tensor rank of every stage has one file, as many as ``args`` says where it is known."""
    found = {rank.key: rank for rank in ranks}
    tensor = _size(facts, "tensor_model_parallel_size", max(rank.tensor for rank in ranks) + 1)
    stages = _size(facts, "pipeline_model_parallel_size", max(rank.stage for rank in ranks) + 1)
    total = tensor * stages
    wanted = ((rank, stage) for stage in range(stages) for rank in range(tensor))
    missing = list(islice((key for key in wanted if key not in found), _MOST_NAMED))
    if missing:
        raise missing_ranks(folder, [_file_name(*key, stages) for key in missing], total)
    if len(ranks) != total:
        raise CheckpointError(
            "mixed-ranks",
            "the directory holds more rank folders than the model has ranks",
            where=str(folder),
            found=f"{len(ranks)} rank folders",
            expected=f"{tensor} tensor ranks x {stages} pipeline stages",
            hint="rank folders of two runs are mixed: keep those of one",
        )


def _size(facts: Mapping[str, Fact], name: str, seen: int) -> int:
    value = facts.get(name)
    return value if isinstance(value, int) and value > 0 else seen


def _file_name(rank: int, stage: int, stages: int) -> str:
    folder = f"mp_rank_{rank:02d}_{stage:03d}" if stages > 1 else f"mp_rank_{rank:02d}"
    return f"{folder}/{FILES[0]}"


def _prefix(rank: MegatronRankFile) -> str:
    return f"{rank.tensor:02d}.{rank.stage:03d}"


def _kind(ranks: list[MegatronRankFile]) -> str:
    stages = len({rank.stage for rank in ranks})
    kind = f"Megatron, {ranks_in_words(len(ranks) // stages)}"
    return f"{kind} x {stages} pipeline stages" if stages > 1 else kind


def _left_out(skipped: list[str]) -> tuple[str, ...]:
    """``_extra_state`` of Transformer Engine is a BytesIO, bytes, ``None`` or a tensor, by version."""
    if not skipped:
        return ()
    return (f"{len(skipped)} entries of model are no tensors and are left out: {', '.join(skipped[:3])}",)
