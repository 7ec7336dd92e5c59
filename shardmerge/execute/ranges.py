"""What whoever makes elements of others asks of the assembler that it works for: ranges of tensors, and buffers.

``regions`` and ``making`` know this and not the assembler, which knows both of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from shardmerge.storage.reading import FilePool
from shardmerge.tensors import TensorEntry

if TYPE_CHECKING:
    from shardmerge.execute.gpu import DeviceCasts  # numpy, which bytes that are only read do without


class Ranges(Protocol):
    """Gives ranges of tensors, whatever holds them. One thread uses it.

    Attributes
    ----------
    pool
        Where files are read.
    tile
        Bytes of the largest buffer that arithmetic works in, on the larger side of an op.
    device
        Where casts are made; None for here.
    overflowed
        Finite values that became infinite so far.
    """

    pool: FilePool
    tile: int
    device: DeviceCasts | None
    overflowed: int

    def view(self, entry: TensorEntry, start: int, count: int) -> memoryview:
        """Returns elements ``[start, start + count)`` as bytes, to be given back with ``release``."""

    def fill(self, entry: TensorEntry, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes of the tensor from element ``start`` on."""

    def take(self, nbytes: int) -> memoryview:
        """Returns a buffer of so many bytes."""

    def release(self, data: memoryview) -> None:
        """Takes a view or a buffer back."""
