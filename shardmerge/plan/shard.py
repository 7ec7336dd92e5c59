"""The tensors and files of an output: for every byte where it comes from. Values; nothing is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardmerge.dtypes import DType
from shardmerge.tensors import Made, Shape, TensorEntry, View, composed


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the output.

    Attributes
    ----------
    name
        Of the target, group prefix included.
    entry
        What it is made of; its type and shape are those of the output.
    rule
        ``file:line:col`` of the rule that asked for it, with its text.
    stored
        Its name in the file.
    offset
        In bytes, from the start of its shard's file.
    """

    name: str
    entry: TensorEntry
    rule: str
    stored: str
    offset: int = 0

    @property
    def dtype(self) -> DType:
        """As in the header."""
        return self.entry.dtype

    @property
    def shape(self) -> Shape:
        """As in the header."""
        return self.entry.shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.entry.numel

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.entry.nbytes


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of weights.

    Attributes
    ----------
    name
        Path inside the output directory.
    nbytes
        Size of the file.
    blobs
        All bytes that are no tensor data, as (offset, bytes), ascending; the first is the header.
    tensors
        In the order of their data.
    checksums
        Where the CRC-32 of a tensor's bytes is to be written, by its name: fields of a torch file.
    """

    name: str
    nbytes: int
    blobs: tuple[tuple[int, bytes], ...]
    tensors: tuple[PlannedTensor, ...]
    checksums: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def bytes_read(tensor: PlannedTensor) -> int:
    """Returns the data bytes that making this tensor reads once; an op that looks twice reads more."""
    return _read_bytes(tensor.entry)


def _read_bytes(entry: TensorEntry) -> int:
    held = composed(entry)
    if held is None:
        return entry.nbytes
    if isinstance(held, View):
        return min(entry.numel * held.base.dtype.itemsize, _read_bytes(held.base))
    return sum(_read_bytes(base) for base in held.bases)


def is_copy(entry: TensorEntry) -> bool:
    """Tells whether a tensor is bytes of the sources, moved and not changed."""
    held = composed(entry)
    return held is None or (not isinstance(held, Made) and all(is_copy(base) for base in held.bases))


def tensor_json(tensor: PlannedTensor) -> dict[str, object]:
    """Returns one tensor of the plan as plain JSON values."""
    return {
        "name": tensor.name,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "nbytes": tensor.nbytes,
        "offset": tensor.offset,
        "rule": tensor.rule,
        "made": entry_json(tensor.entry),
    }


def entry_json(entry: TensorEntry) -> dict[str, object]:
    """Returns what a tensor is made of as plain JSON values: an op over others, or a tensor of a source."""
    held = composed(entry)
    if held is None:
        return {
            "source": entry.source,
            "tensor": entry.name,
            "dtype": entry.dtype.name,
            "shape": list(entry.shape),
            "origin": entry.origin,
        }
    return {"op": held.recipe.label, "of": [entry_json(base) for base in held.bases]}
