"""Assembles a range of a tensor, in row-major order, from whatever holds it: extents, views, columns, arithmetic.

The planner counts what this module allocates (``shardmerge.memory``); where one changes, so does the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardmerge.compose import meta
from shardmerge.execute.gpu import CudaCasts
from shardmerge.execute.rearrange import rearrange
from shardmerge.memory import KEPT_TILES, LARGEST_TILE, WORKSPACE, chunk_elements, column_elements, tile_elements
from shardmerge.ops.arrays import Array, as_array
from shardmerge.ops.casts import Cast
from shardmerge.ops.contract import Arithmetic, Meta, State
from shardmerge.pieces import is_plain, pieces_in, single_extent
from shardmerge.storage.reading import FilePool
from shardmerge.strides import direct, in_order, run, span
from shardmerge.tensors import Columns, Extent, Made, Piece, Shape, Strided, TensorEntry, View, dense

# Runs of a view are read one by one, and not with what lies between them, where that saves a quarter of the bytes and
# either they are this long, half a page, or what lies between them is: a read of its own costs as much time as copying
# 8 KiB (2.7 us against 0.3 us a KiB).
_RUN = 2 << 10
_GAP = 8 << 10

# What lies between runs is read ahead with them where it is at most so many times as much: it is the next band's, and
# cold, one large request to the disk was 2.5 times as fast as 4,096 of 8 KiB.
_MOST_AHEAD = 8

# Most computed tensors that an assembler remembers; one is made of a few at most.
_MOST_MAKINGS = 64

# Most runs that are listed at a time, in Python objects.
_MOST_RUNS = 1024


def gather(pool: FilePool, entry: TensorEntry, start: int, out: memoryview) -> None:
    """Fills ``out`` with the bytes of the tensor from element ``start`` on; a whole number of elements."""
    Assembler(pool).fill(entry, start, out)


@dataclass(frozen=True, slots=True)
class _Making:
    """What is the same for every tile of a computed tensor; 20 us to find, a cast of 200 KiB."""

    held: Made
    op: Arithmetic
    metas: tuple[Meta, ...]
    unit: int
    step: int
    chunk: int


class Assembler:
    """Makes ranges of tensors. It keeps buffers and the states of ops, so every thread has its own.

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
    overflowed
        Finite values that became infinite so far.
    """

    def __init__(self, pool: FilePool, tile: int = LARGEST_TILE, device: CudaCasts | None = None) -> None:
        self.overflowed = 0
        self._device = device
        self._pool = pool
        self._tile = tile
        self._free: list[Array] = []
        self._states: dict[int, tuple[Made, State]] = {}
        self._makings: dict[int, _Making] = {}

    def forget(self) -> None:
        """Lets the states of ops go; called when a tensor is done."""
        self._states.clear()

    def view(self, entry: TensorEntry, start: int, count: int) -> memoryview:
        """Returns elements ``[start, start + count)`` as bytes: mapped where one extent holds them, else in a buffer.

        Give it back with ``release`` when done.
        """
        extent = single_extent(entry, start, count)
        mapped = self._pool.window(extent.file, extent.offset, extent.nbytes) if extent is not None else None
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
        """Returns a buffer of so many bytes, a used one where one fits."""
        fitting = [(buffer.nbytes, i) for i, buffer in enumerate(self._free) if nbytes <= buffer.nbytes <= 2 * nbytes]
        if fitting:
            return self._free.pop(min(fitting)[1]).data[:nbytes]
        return np.empty(nbytes, np.uint8).data

    def release(self, data: memoryview) -> None:
        """Takes a buffer back, to be used again; a mapped window goes with its last view."""
        owner = data.obj
        if isinstance(owner, np.ndarray) and owner.nbytes <= self._tile:
            self._free.append(owner)
            while sum(buffer.nbytes for buffer in self._free) > KEPT_TILES * self._tile:
                self._free.pop(0)

    def _piece(self, entry: TensorEntry, piece: Piece, start: int, out: memoryview) -> None:
        held = piece.held
        size = entry.dtype.itemsize
        if isinstance(held, Extent):
            part = held if len(out) == held.nbytes else held.slice(start * size, len(out))
            self._pool.read_into(part.file, part.offset, out)
        elif isinstance(held, Strided):
            span = held.extent.nbytes // size
            base = TensorEntry("", entry.dtype, (span,), dense(held.extent, span))
            self._strided(base, 0, held.shape, held.strides, start, _elements(out, size))
        elif isinstance(held, View):
            held = direct(held)
            self._strided(held.base, held.offset, held.shape, held.strides, start, _elements(out, size))
        elif isinstance(held, Columns):
            self._columns(held, start, _elements(out, size))
        else:
            self._made(entry, held, start, out)

    # --- views ---

    def _strided(
        self, base: TensorEntry, offset: int, shape: Shape, strides: Sequence[int], start: int, target: Array
    ) -> None:
        """Whole outer rows as one box, partial rows by going one axis in."""
        if not len(target):
            return
        if not shape:
            self._box(base, offset, (1,), (1,), target)
            return
        inner = prod(shape[1:])
        row, within = divmod(start, inner)
        if within or len(target) < inner:  # a partial row first
            taken = min(inner - within, len(target))
            self._strided(base, offset + row * strides[0], shape[1:], strides[1:], within, target[:taken])
            self._strided(base, offset, shape, strides, start + taken, target[taken:])
            return
        rows = len(target) // inner
        box = target[: rows * inner].reshape(rows, *shape[1:])
        self._box(base, offset + row * strides[0], box.shape, strides, box)
        self._strided(base, offset, shape, strides, start + rows * inner, target[rows * inner :])

    def _box(self, base: TensorEntry, first: int, shape: Shape, strides: Sequence[int], target: Array) -> None:
        """Reads what a box lies in and rearranges it: run by run, or all of it, in halves where that is too much."""
        size = base.dtype.itemsize
        reach = span(shape, strides)
        if reach == target.size and in_order(shape, strides) and target.flags.c_contiguous:
            self.fill(base, first, _bytes(target))
            return
        apart = _read_apart(base, shape, strides)
        much = min(WORKSPACE // size, _MOST_RUNS * run(shape, strides)) if apart else WORKSPACE // size
        if (target.size if apart else reach) > much and reach > 1:
            steps = [(n - 1) * step for n, step in zip(shape, strides, strict=True)]
            axis = steps.index(max(steps))
            half = shape[axis] // 2
            for low, high in ((0, half), (half, shape[axis])):
                part = target[(slice(None),) * axis + (slice(low, high),)]
                self._box(base, first + low * strides[axis], part.shape, strides, part)
            return
        if apart:
            self._runs(base, first, shape, strides, target)
            return
        data = self.view(base, first, reach)
        rearrange(target, _strided(_elements(data, size), shape, strides))
        self.release(data)

    def _runs(self, base: TensorEntry, first: int, shape: Shape, strides: Sequence[int], target: Array) -> None:
        """Reads the runs of a box one by one, side by side, and puts them where they belong."""
        size, length = base.dtype.itemsize, run(shape, strides)
        starts, packed = np.full(1, first, np.int64), list(strides)
        for axis in sorted(range(len(shape)), key=lambda axis: -strides[axis]):
            if strides[axis] >= length and shape[axis] > 1:  # not within a run
                packed[axis] = target.size // (len(starts) * shape[axis])
                starts = np.add.outer(starts, np.arange(shape[axis], dtype=np.int64) * strides[axis]).reshape(-1)
        data = self.take(target.nbytes)
        parts = [data[at : at + length * size] for at in range(0, target.nbytes, length * size)]
        extent = single_extent(base, first, span(shape, strides))
        if extent is None:
            for start, part in zip(starts.tolist(), parts, strict=True):
                self.fill(base, start, part)
        else:
            offsets = extent.offset + (starts - first) * size
            if _MOST_AHEAD * target.nbytes >= extent.nbytes:
                self._pool.expect(extent.file, extent.offset, extent.nbytes)
            self._pool.read_runs(extent.file, offsets.tolist(), parts)
        rearrange(target, _strided(_elements(data, size), shape, packed))
        self.release(data)

    # --- columns ---

    def _columns(self, held: Columns, start: int, target: Array) -> None:
        """Whole rows in blocks, partial rows base by base."""
        widths = [base.numel // held.rows for base in held.bases]
        total = sum(widths)
        row, within = divmod(start, total)
        done = 0
        while done < len(target):
            if within or len(target) - done < total:
                taken = min(total - within, len(target) - done)
                self._row(held, widths, row, within, target[done : done + taken])
                row, within = row + 1, 0
            else:
                rows = (len(target) - done) // total
                taken = rows * total
                self._block(held, widths, row, target[done : done + taken].reshape(rows, total))
                row += rows
            done += taken

    def _row(self, held: Columns, widths: Sequence[int], row: int, within: int, target: Array) -> None:
        column = 0
        for base, width in zip(held.bases, widths, strict=True):
            low, high = max(column, within), min(column + width, within + len(target))
            if low < high:
                self.fill(base, row * width + low - column, _bytes(target[low - within : high - within]))
            column += width

    def _block(self, held: Columns, widths: Sequence[int], row: int, target: Array) -> None:
        column = 0
        for base, width in zip(held.bases, widths, strict=True):
            step = max(column_elements(base, self._tile) // max(width, 1), 1)
            for low in range(0, len(target), step):
                self._column(base, row + low, target[low : low + step, column : column + width])
            column += width

    def _column(self, base: TensorEntry, row: int, target: Array) -> None:
        """Fills a part of some rows; directly where it is of one, since that may be of any length."""
        rows, width = target.shape
        if rows == 1:
            self.fill(base, row * width, _bytes(target[0]))
            return
        data = self.view(base, row * width, rows * width)
        target[...] = _elements(data, target.itemsize).reshape(rows, width)
        self.release(data)

    # --- arithmetic ---

    def _made(self, entry: TensorEntry, held: Made, start: int, out: memoryview) -> None:
        making = self._making(entry, held)
        unit, size = making.unit, entry.dtype.itemsize
        state = self._state(held, making.op)
        stop = start + len(out) // size
        low = start - start % unit
        while low < stop:
            high = min(low + making.step, entry.numel, -(-stop // unit) * unit)
            inside = out[(low - start) * size : (high - start) * size] if low >= start and high <= stop else None
            made = inside if inside is not None else self.take((high - low) * size)
            self._apply(making, state, low, as_array(made, entry.dtype))
            if inside is None:
                first, last = max(low, start), min(high, stop)
                out[(first - start) * size : (last - start) * size] = made[(first - low) * size : (last - low) * size]
                self.release(made)
            low = high

    def _making(self, entry: TensorEntry, held: Made) -> _Making:
        found = self._makings.get(id(held))
        if found is None:
            if len(self._makings) == _MOST_MAKINGS:
                self._makings.clear()
            op, metas = arithmetic(held), tuple(meta(base) for base in held.bases)
            step, chunk = tile_elements(entry, self._tile), chunk_elements(entry, held, self._tile)
            found = self._makings[id(held)] = _Making(held, op, metas, op.unit(metas), step, chunk)
        return found

    def _apply(self, making: _Making, state: State, start: int, out: Array) -> None:
        """Reads what the elements are made of at once, and makes them a chunk at a time."""
        op, bases = making.op, making.held.bases
        ranges = op.ranges(making.metas, start, len(out))
        tiles = [self.view(base, first, count) for base, (first, count) in zip(bases, ranges, strict=True)]
        arrays = [as_array(tile, base.dtype) for tile, base in zip(tiles, bases, strict=True)]
        for low in range(0, len(out), making.chunk):
            part = out[low : low + making.chunk]
            wanted = op.ranges(making.metas, start + low, len(part)) if len(part) < len(out) else ranges
            inputs = [
                array[first - begin : first - begin + count]
                for array, (first, count), (begin, _) in zip(arrays, wanted, ranges, strict=True)
            ]
            if self._device is not None and isinstance(op, Cast):
                self.overflowed += self._device.apply(op, inputs[0], part)
            else:
                self.overflowed += op.apply(state, inputs, start + low, part)
            del inputs
        del arrays
        for tile in tiles:
            self.release(tile)

    def _state(self, held: Made, op: Arithmetic) -> State:
        if id(held) not in self._states:
            self._states[id(held)] = (held, op.prepare([_Stream(self, base) for base in held.bases]))
        return self._states[id(held)][1]


class _Stream:
    """An input that an op reads ahead of its tiles."""

    def __init__(self, assembler: Assembler, entry: TensorEntry) -> None:
        self._assembler = assembler
        self._entry = entry

    @property
    def meta(self) -> Meta:
        return meta(self._entry)

    def read(self, start: int, count: int) -> Array:
        data = np.empty(count * self._entry.dtype.itemsize, np.uint8)
        self._assembler.fill(self._entry, start, data.data)
        return as_array(data.data, self._entry.dtype)


def arithmetic(held: Made) -> Arithmetic:
    """Returns the op of a computed tensor."""
    if not isinstance(held.recipe, Arithmetic):
        raise TypeError(f"{held.recipe.label} does not compute")
    return held.recipe


def _elements(data: memoryview, size: int) -> Array:
    """Returns bytes as elements that can be copied and not computed with."""
    return np.frombuffer(data, f"u{size}")


def _bytes(target: Array) -> memoryview:
    return target.reshape(-1).view(np.uint8).data


def _read_apart(base: TensorEntry, shape: Shape, strides: Sequence[int]) -> bool:
    """Tells whether the runs of a box are read for themselves, without what lies between them."""
    seen, reach = prod(shape), span(shape, strides)
    if 4 * seen >= 3 * reach or 0 in strides or not is_plain(base):
        return False
    length = run(shape, strides)
    if prod(n for n, step in zip(shape, strides, strict=True) if step < length) != length:  # runs that overlap
        return False
    gap = (reach - seen) // max(seen // length - 1, 1)
    return length * base.dtype.itemsize >= _RUN or gap * base.dtype.itemsize >= _GAP


def _strided(elements: Array, shape: Shape, strides: Sequence[int]) -> Array:
    size = elements.itemsize
    return np.lib.stride_tricks.as_strided(elements, shape, tuple(step * size for step in strides), writeable=False)
