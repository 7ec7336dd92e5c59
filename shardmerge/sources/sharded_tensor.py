"""What one rank holds of a ShardedTensor, FSDP1's sharded state dict (torch 2.1 to 2.13, without a device mesh).

``torch/distributed/_shard/sharded_tensor/api.py``, ``__setstate__``: the state is the rank's own shards, the metadata
of all, the process group, the sharding spec and a flag. A shard says its own offsets. ``Shard`` and ``ShardMetadata``
have ``__slots__``.
"""

from __future__ import annotations

from shardmerge.shown import shown
from shardmerge.sources.local_tensor import LocalTensor, damaged_dtensor, is_wrapped, unsupported, whole_of
from shardmerge.sources.pickle_bounds import are_sizes, is_size
from shardmerge.sources.pickle_values import Opaque, PickleValue, TensorRef, attributes, kind
from shardmerge.tensors import Shape


def is_sharded_tensor(value: PickleValue) -> bool:
    """Tells whether a value is a ShardedTensor."""
    if not isinstance(value, Opaque) or not is_wrapped(value):
        return False
    state = value.args[3]
    return isinstance(state, tuple) and len(state) > 2 and "shards_metadata" in attributes(state[1])


def local_sharded_tensor(sharded: Opaque, where: str) -> LocalTensor:
    """Returns what the rank that saved a ShardedTensor holds of it.

    Raises
    ------
    CheckpointError
        ``damaged-dtensor``, ``unsupported-tensor``, as ``local_dtensor``.
    """
    dtype, shape = whole_of(sharded, where)
    state = sharded.args[3]
    assert isinstance(state, tuple)
    shards, metadata, group = state[:3]
    if attributes(metadata).get("size") != shape or not isinstance(shards, list):
        raise damaged_dtensor(
            "a sharded tensor says two things of itself", where, shown(attributes(metadata).get("size"))
        )
    parts = tuple(_part(shard, shape, where) for shard in shards)
    for _, ref in parts:
        if ref.dtype != dtype:
            raise damaged_dtensor("a sharded tensor says two things of itself", where, ref.dtype.name, dtype.name)
    ranks, world = _counts(group)
    return LocalTensor(dtype, shape, parts, ranks, world)


def _part(shard: PickleValue, shape: Shape, where: str) -> tuple[tuple[int, ...], TensorRef]:
    held = attributes(shard)
    local, stated = held.get("tensor"), attributes(held.get("metadata"))
    if not isinstance(local, TensorRef):
        raise unsupported("a sharded tensor whose local part is of a kind that is not read", where, kind(local))
    offsets, sizes = stated.get("shard_offsets"), stated.get("shard_sizes")
    if not are_sizes(offsets) or not are_sizes(sizes) or len(offsets) != len(shape) or tuple(sizes) != local.shape:
        raise damaged_dtensor(
            "a shard does not say where it lies", where, shown([offsets, sizes]), str(list(local.shape))
        )
    return tuple(offsets), local


def _counts(group: PickleValue) -> tuple[int, int]:
    """Returns the ranks of the process group and of the run (``ProcessGroupState``)."""
    ranks, world = (attributes(group).get(name) for name in ("local_world_size", "global_world_size"))
    return ranks if is_size(ranks) else 1, world if is_size(world) else 1
