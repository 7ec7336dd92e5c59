"""``DCP_SHARDING_INFO`` of a safetensors file: which part of its tensor each of its tensors is.

``__metadata__`` of a file that torch's ``HuggingFaceStorageWriter`` wrote has it, as JSON in a string: ``{name:
{"saved_offsets": [first row, first column, ...]}}`` (``torch/distributed/checkpoint/filesystem.py``). The shape of the
whole tensor stands nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardmerge.errors import CheckpointError
from shardmerge.shown import shown
from shardmerge.sources.strict_json import strict_json
from shardmerge.tensors import Shape, TensorEntry

_KEY, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
# As in the shapes of a safetensors header: no file system holds a larger file.
_LARGEST_OFFSET = 1 << 48


def saved_offsets(metadata: Mapping[str, str], entries: Mapping[str, TensorEntry], path: str) -> Mapping[str, Shape]:
    """Returns where each tensor of a file begins in its whole, an index an axis; nothing for a file without offsets.

    Raises
    ------
    CheckpointError
        ``damaged-offsets``: not the expected JSON, or not one list of offsets a tensor.
    """
    if _KEY not in metadata:
        return {}
    try:
        value = strict_json(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(path, "not an object")
    odd = sorted(value.keys() ^ entries.keys())
    if odd:
        raise _damaged(path, f"{len(odd)} tensors are in one of header and offsets alone", ", ".join(odd[:5]))
    return dict(_offsets(value, entries, path))


def _offsets(value: Mapping[str, object], entries: Mapping[str, TensorEntry], path: str) -> Iterator[tuple[str, Shape]]:
    for name, entry in entries.items():
        stated = value[name]
        offsets = stated.get(_OFFSETS) if isinstance(stated, dict) else None
        if not isinstance(offsets, list) or not all(type(n) is int and 0 <= n < _LARGEST_OFFSET for n in offsets):
            raise _damaged(path, f"those of {name!r} are no list of indices", shown(stated, 200))
        if len(offsets) != len(entry.shape):
            raise _damaged(path, f"those of {name!r} are not one an axis", f"{offsets} for {list(entry.shape)}")
        yield name, tuple(offsets)


def _damaged(path: str, what: str, found: str = "") -> CheckpointError:
    return CheckpointError(
        "damaged-offsets", f"the offsets of a shard ({_KEY}) cannot be used: {what}", where=path, found=found
    )
