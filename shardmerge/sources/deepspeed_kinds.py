"""The kinds of DeepSpeed checkpoints: a tag directory in, a catalog out, by the way its run was spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.sources.deepspeed import read_parallel_rank
from shardmerge.sources.deepspeed_checks import NODES
from shardmerge.sources.deepspeed_claims import DeepSpeedClaims, read_claims
from shardmerge.sources.deepspeed_files import MOMENTS, DeepSpeedView, TagFiles, kind_not_yet, list_tag, model_file
from shardmerge.sources.deepspeed_moments import no_moments
from shardmerge.sources.deepspeed_ranks import RankReader
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.tensors import Catalog

# Tensor parallel ranks: no run has a tenth of them.
_MOST_RANKS = 1024


def read_deepspeed(folder: Path, *, view: DeepSpeedView = "fp32") -> Catalog:
    """Returns the catalog of a DeepSpeed tag directory.

    Parameters
    ----------
    folder
        The directory that holds the ``*_model_states.pt`` files.
    view
        ``fp32``: the master weights, with frozen parameters and buffers as they were saved. ``module``: the 16-bit
        weights of the forward pass, where the checkpoint has them (stages 0 to 2). ``exp_avg``, ``exp_avg_sq``: a
        moment of Adam under the names of the weights that are trained; ``optimizer`` of the catalog has the rest.

    Raises
    ------
    CheckpointError
        ``kind-not-yet``, ``missing-layer``; ``no-moments`` of all but plain ZeRO and its universal form; and what
        ``read_parallel_rank``, ``join_ranks``, ``read_pipeline`` and ``read_universal`` raise.
    """
    listed = list_tag(folder)
    reader = RankReader()
    claims = read_claims(as_dict(reader.file(listed.models[0]).root))
    _check_kind(folder, listed, claims)
    kind = _kind(listed, claims)
    if kind and view in MOMENTS:
        raise no_moments(str(folder), f"those of {kind} are not read")
    if listed.universal:
        from shardmerge.sources.deepspeed_universal import read_universal

        return read_universal(folder, listed, reader, view)
    if listed.layers:
        from shardmerge.sources.deepspeed_pipeline import read_pipeline

        return read_pipeline(folder, listed, reader, view)
    if not _is_cut(listed, claims):
        return read_parallel_rank(folder, listed, reader, view)
    _check_parallel(folder, listed, claims)
    return _joined(folder, listed, reader, view)


def _check_kind(folder: Path, listed: TagFiles, claims: DeepSpeedClaims) -> None:
    """Raises ``kind-not-yet`` for a run in a way that is not read, also where only a part of it is there.

    A pipeline without its layer files is ``missing-layer``; the conversion to a universal checkpoint leaves them out.
    """
    pipeline = bool(listed.layers) or (listed.universal and claims.layered)
    if claims.autoep:
        raise kind_not_yet(folder, "AutoEP (fused experts)")
    other = next(_beside_experts(listed, claims), "") if _has_experts(listed, claims) else ""
    if other:
        raise kind_not_yet(folder, f"{other} mixture-of-experts (MoE)")
    if not pipeline and (claims.layered or claims.pipeline_parallel > 1):
        raise CheckpointError(
            "missing-layer",
            "this is a pipeline-parallel DeepSpeed checkpoint, and its layer files are missing",
            where=str(folder),
            expected="layer_00-model_states.pt and so on",
            hint=NODES,
        )
    if pipeline and claims.pipeline_parallel and claims.tensor_parallel > 1:
        raise kind_not_yet(folder, "pipeline- and tensor-parallel")
    if listed.universal and not pipeline and _is_cut(listed, claims):
        raise kind_not_yet(folder, "universal tensor-parallel")


def _beside_experts(listed: TagFiles, claims: DeepSpeedClaims) -> Iterator[str]:
    """Yields what experts are not read with."""
    if listed.layers or claims.layered:
        yield "pipeline-parallel"
    if listed.universal:
        yield "universal"
    if claims.tensor_parallel > 1:
        yield "tensor-parallel"
    if claims.stage == 3:
        yield "ZeRO-3"


def _has_experts(listed: TagFiles, claims: DeepSpeedClaims) -> bool:
    return bool(listed.experts) or claims.experts > 0


def _is_cut(listed: TagFiles, claims: DeepSpeedClaims) -> bool:
    """Tells whether there are tensor parallel ranks, unless the ranks in names are stages of a pipeline."""
    return listed.parallel != [0] or claims.tensor_parallel > 1


def _kind(listed: TagFiles, claims: DeepSpeedClaims) -> str:
    """Returns what a checkpoint is whose moments are not found as those of plain ZeRO are; ``""`` for ZeRO itself,
    and for a universal checkpoint of it.
    """
    kinds = {
        "a pipeline": bool(listed.layers) or claims.layered,
        "a mixture of experts": _has_experts(listed, claims),
        "tensor parallel ranks": _is_cut(listed, claims),
    }
    return next((kind for kind, here in kinds.items() if here), "")


def _joined(folder: Path, listed: TagFiles, reader: RankReader, view: DeepSpeedView) -> Catalog:
    """Reads all tensor parallel ranks, each by itself, with the problems of all of them."""
    from shardmerge.sources.deepspeed_tensor import TensorRank, join_ranks

    ranks: list[TensorRank] = []
    errors: list[ShardmergeError] = []
    for parallel in listed.parallel:
        mine = listed.of_rank(parallel)
        root = as_dict(reader.file(mine.models[0]).root)
        try:
            catalog = read_parallel_rank(folder, mine, reader, view)
        except ShardmergeError as error:
            errors += error.each()
        else:
            ranks.append(TensorRank(catalog, read_claims(root), root, mine.models[0].path))
    raise_all(errors)
    return join_ranks(folder, ranks)


def _check_parallel(folder: Path, listed: TagFiles, claims: DeepSpeedClaims) -> None:
    """Checks that every tensor parallel rank has a model file, as many as the first one states."""
    there = {file.model_parallel for file in listed.models}
    total = claims.tensor_parallel if claims.tensor_parallel > 1 else max(listed.parallel) + 1
    first = listed.models[0]
    beyond = [rank for rank in listed.parallel if rank >= total]
    if total > _MOST_RANKS or beyond or claims.tensor_parallel == 1:
        raise CheckpointError(
            "mixed-runs",
            "there are files of other model-parallel ranks than the run has",
            where=str(folder),
            found=f"mp_rank {', '.join(map(str, (beyond or listed.parallel)[:8]))}",
            expected=f"{shown(claims.tensor_parallel)} tensor parallel ranks, as {first.path.name} states",
            hint="files of another run lie in the same directory: move them elsewhere",
        )
    missing = [rank for rank in range(total) if rank not in there]
    if missing:
        names = [model_file(rank, partitioned=first.partitioned) for rank in missing[:8]]
        raise CheckpointError(
            "missing-rank",
            f"not all of {total} tensor parallel ranks are there: {', '.join(names)}",
            where=str(folder),
            found=f"{len(there)} of them",
            expected=f"mp_rank_00 to mp_rank_{total - 1:02d}, and the optimizer files of each",
            hint=NODES,
        )
