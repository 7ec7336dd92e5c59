"""The kinds of DeepSpeed checkpoints: a tag directory in, a catalog out, by the way its run was spread over ranks."""

from __future__ import annotations

from pathlib import Path

from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.sources.deepspeed import read_parallel_rank
from shardmerge.sources.deepspeed_checks import check_kind
from shardmerge.sources.deepspeed_claims import DeepSpeedClaims, read_claims
from shardmerge.sources.deepspeed_files import DeepSpeedView, TagFiles, list_tag, model_file
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
        weights of the forward pass, where the checkpoint has them (stages 0 to 2).

    Raises
    ------
    CheckpointError
        ``kind-not-yet`` (pipeline, universal), and what ``read_parallel_rank`` and ``join_ranks`` raise.
    """
    listed = list_tag(folder)
    reader = RankReader()
    claims = read_claims(as_dict(reader.file(listed.models[0]).root))
    check_kind(folder, claims)
    if listed.parallel == [0] and claims.tensor_parallel <= 1:
        return read_parallel_rank(folder, listed, reader, view)
    _check_parallel(folder, listed, claims)
    return _joined(folder, listed, reader, view)


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
            hint="every node writes its own ranks: gather the files of all nodes in one directory",
        )
