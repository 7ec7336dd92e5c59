"""Assembles a range of a tensor, in row-major order, from whatever holds it: extents, views, boxes, columns, ops.

Bytes that are only read need no numpy, whose import takes as long as copying 200 MB: what is rearranged is the business
of ``regions``, arithmetic that of ``making``, and each is imported with the first tensor that needs it. Both read
through the assembler, as ``ranges`` describes it.

The planner counts what these modules allocate (``shardmerge.plan.memory``); where one changes, so does the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias
from weakref import proxy

from shardmerge.plan.memory import KEPT_TILES, LARGEST_TILE
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Extent, Made, Piece, TensorEntry
from shardmerge.tensors.pieces import pieces_in, single_extent

if TYPE_CHECKING:
    from shardmerge.execute.gpu import DeviceCasts
    from shardmerge.execute.making import Maker
    from shardmerge.execute.regions import Regions
    from shardmerge.ops.arrays import Array


# Memory of one thread that is read into and written from.
Buffer: TypeAlias = "bytearray | Array"


def gather(pool: FilePool, entry: TensorEntry, start: int, out: memoryview) -> None:
    """Fills ``out`` with the bytes of the tensor from element ``start`` on; a whole number of elements."""
    Assembler(pool).fill(entry, start, out)


class Assembler:
    """Makes ranges of tensors. It keeps buffers and the states of ops, so every thread has its own.

    Those that it makes to help it read through it, and refer to it weakly: in a cycle it would keep files open and
    buffers until the garbage collector comes.

    Parameters
    ----------
    pool
        Where files are read.
    tile
        Bytes of the largest buffer that arithmetic works in, on the larger side of an op.
    device
        Where casts are made; None for here.

    Attributes
    ----------
    pool, tile, device
        As given.
    overflowed
        Finite values that became infinite so far.
    """

    def __init__(self, pool: FilePool, tile: int = LARGEST_TILE, device: DeviceCasts | None = None) -> None:
        self.pool = pool
        self.tile = tile
        self.device = device
        self.overflowed = 0
        self._new: Callable[[int], Buffer] = bytearray if device is None else device.buffer
        self._kind = type(self._new(0))
        self._free: list[Buffer] = []
        self._regions: Regions | None = None
        self._maker: Maker | None = None

    def forget(self) -> None:
        """Lets the states of ops go; called when a tensor is done, or several that share one."""
        if self._maker is not None:
            self._maker.forget()

    def view(self, entry: TensorEntry, start: int, count: int) -> memoryview:
        """Returns elements ``[start, start + count)`` as bytes: mapped where one extent holds them, else in a buffer.

        Give it back with ``release`` when done.
        """
        extent = single_extent(entry, start, count)
        mapped = self.pool.window(extent.file, extent.offset, extent.nbytes) if extent is not None else None
        if mapped is not None:
            return mapped
        data = self.take(count * entry.dtype.itemsize)
        self.fill(entry, start, data)
        return data

    def fill(self, entry: TensorEntry, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes of the tensor from element ``start`` on."""
        size = entry.dtype.itemsize
        count = len(out) // size
        for piece in pieces_in(entry.pieces, start, count):
            low = max(start, piece.start)
            high = min(start + count, piece.start + piece.count)
            self._piece(entry, piece, low - piece.start, out[(low - start) * size : (high - start) * size])

    def take(self, nbytes: int) -> memoryview:
        """Returns a buffer of so many bytes, a used one where one fits; pinned memory where a device makes casts."""
        fitting = [(len(buffer), i) for i, buffer in enumerate(self._free) if nbytes <= len(buffer) <= 2 * nbytes]
        buffer = self._free.pop(min(fitting)[1]) if fitting else self._new(nbytes)
        return (memoryview(buffer) if isinstance(buffer, bytearray) else buffer.data)[:nbytes]

    def release(self, data: memoryview) -> None:
        """Takes a buffer back, to be used again; a mapped window goes with its last view."""
        owner = data.obj
        if isinstance(owner, self._kind) and len(owner) <= self.tile:
            self._free.append(owner)
            while sum(map(len, self._free)) > KEPT_TILES * self.tile:
                self._free.pop(0)

    def _piece(self, entry: TensorEntry, piece: Piece, start: int, out: memoryview) -> None:
        held = piece.held
        if isinstance(held, Extent):
            part = held if len(out) == held.nbytes else held.slice(start * entry.dtype.itemsize, len(out))
            self.pool.read_into(part.file, part.offset, out)
        elif isinstance(held, Made):
            self._making().fill(entry, held, start, out)
        else:
            self._arranging().fill(entry.dtype, held, start, out)

    def _arranging(self) -> Regions:
        if self._regions is None:
            from shardmerge.execute.regions import Regions

            self._regions = Regions(proxy(self))
        return self._regions

    def _making(self) -> Maker:
        if self._maker is None:
            from shardmerge.execute.making import Maker

            self._maker = Maker(proxy(self))
        return self._maker
