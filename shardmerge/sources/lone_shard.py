"""One shard of distributed safetensors under another name, which looks like any other safetensors file.

A process that saves alone writes ``DCP_SHARDING_INFO`` as well, with all offsets 0; so does the first of several ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import CheckpointError
from shardmerge.sources.distributed_count import CutTensor, narrow_norm
from shardmerge.sources.distributed_offsets import saved_offsets
from shardmerge.tensors import TensorEntry


def refuse_slices(metadata: Mapping[str, str], entries: Mapping[str, TensorEntry], path: str) -> None:
    """Raises ``lone-shard`` for a file whose tensors are parts of larger ones, by their offsets or by their sizes."""
    offsets = saved_offsets(metadata, entries, path)
    inner = next((name for name, at in offsets.items() if any(at)), None)
    if inner is not None:
        raise _lone(path, f"{inner[:200]} begins at {list(offsets[inner])} of the whole")
    narrow = narrow_norm({name: _alone(entries[name]) for name in offsets})
    if narrow is not None:
        raise _lone(path, f"{narrow.name[:200]} of {narrow.size}, beside an embedding of {narrow.hidden} columns")


def _alone(entry: TensorEntry) -> CutTensor:
    return CutTensor(entry.shape, [entry.shape] if entry.numel else [], [1] if entry.numel else [], 1)


def _lone(path: str, found: str) -> CheckpointError:
    return CheckpointError(
        "lone-shard",
        "this is one shard of a distributed checkpoint: it holds a part of each tensor",
        where=path,
        found=found,
        expected="whole tensors",
        hint="pass a directory with the shards of all ranks, by the names that torch gave them: "
        "shard-00001-model-00001-of-00001.safetensors and so on",
    )
