"""How tensors are laid out in safetensors files, and the index. Every offset is fixed before any byte moves."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from shardmerge.plan import PlannedShard, PlannedTensor

# What huggingface_hub and DeepSpeed use; decimal, as everywhere in the ecosystem.
DEFAULT_SHARD_SIZE = 5_000_000_000

# Data starts on a page. The format wants a multiple of 8; a page costs at most 4 KB a shard, lets loaders map tensors
# aligned, and keeps two threads from writing the same page of the file.
_DATA_ALIGNMENT = 4096

_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Returns a sort key that puts ``layers.2`` before ``layers.11``."""
    parts = _DIGITS.split(name)
    return tuple((int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts))


def lay_out(tensors: Iterable[PlannedTensor], shard_size: int) -> tuple[PlannedShard, ...]:
    """Returns the shards: natural key order, filled greedily, no tensor split, one that is too large alone.

    Parameters
    ----------
    tensors
        With any offset; the offsets are set here.
    shard_size
        Most bytes of tensors in one shard.
    """
    ordered = sorted(tensors, key=lambda tensor: natural_key(tensor.name))
    groups = list(_groups(ordered, shard_size))
    names = _names(len(groups))
    return tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))


def index_json(shards: Sequence[PlannedShard]) -> bytes:
    """Returns ``model.safetensors.index.json`` as transformers writes it: sorted, indented, with the exact total."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    value = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _groups(tensors: list[PlannedTensor], shard_size: int) -> Iterator[list[PlannedTensor]]:
    group: list[PlannedTensor] = []
    filled = 0
    for tensor in tensors:
        if group and filled + tensor.nbytes > shard_size:
            yield group
            group, filled = [], 0
        group.append(tensor)
        filled += tensor.nbytes
    yield group


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shard(name: str, tensors: list[PlannedTensor]) -> PlannedShard:
    """Larger element types first, so that every tensor is aligned to its own type (the reference writer's order)."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = _header(ordered)
    cursor = len(header)
    placed = []
    for tensor in ordered:
        placed.append(replace(tensor, offset=cursor))
        cursor += tensor.nbytes
    return PlannedShard(name, header, tuple(placed))


def _header(tensors: list[PlannedTensor]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without it
    cursor = 0
    for tensor in tensors:
        end = cursor + tensor.nbytes
        fields[tensor.name] = {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "data_offsets": [cursor, end],
        }
        cursor = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)
