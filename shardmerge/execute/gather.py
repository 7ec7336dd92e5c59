"""Assembles a range of a tensor, in row-major order, from whatever holds it: extents, views, columns, arithmetic.

The planner counts what this module allocates (``shardmerge.memory``); where one changes, so does the other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from shardmerge.compose import meta
from shardmerge.execute.gpu import CudaCasts
from shardmerge.memory import KEPT_TILES, LARGEST_TILE, WORKSPACE, chunk_elements
from shardmerge.ops.arrays import Array, as_array
from shardmerge.ops.casts import Cast
from shardmerge.ops.contract import Arithmetic, Meta, State
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Columns, Extent, Made, Piece, Shape, Strided, TensorEntry, View, dense

# Runs of a view at least this long are read one by one where more than a quarter of what is read with them would not be
# used: a shorter one costs a page anyway.
_PAGE = 4096


def gather(pool: FilePool, entry: TensorEntry, start: int, out: memoryview) -> None:
    """Fills ``out`` with the bytes of the tensor from element ``start`` on; a whole number of elements."""
    Assembler(pool).fill(entry, start, out)


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
            part = held.slice(start * size, len(out))
            self._pool.read_into(part.file, part.offset, out)
        elif isinstance(held, Strided):
            span = held.extent.nbytes // size
            base = TensorEntry("", entry.dtype, (span,), dense(held.extent, span))
            self._strided(base, 0, held.shape, held.strides, start, _elements(out, size))
        elif isinstance(held, View):
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
        """Reads the span that a box lies in and rearranges it, or halves the box where the span is too much."""
        reach = [(n - 1) * step for n, step in zip(shape, strides, strict=True)]
        span = sum(reach) + 1
        size = base.dtype.itemsize
        if span == target.size and _in_order(shape, strides) and target.flags.c_contiguous:
            self.fill(base, first, _bytes(target))
            return
        wasteful = 4 * target.size < 3 * span and _run(shape, strides) * size >= _PAGE and _is_plain(base)
        if (span * size > WORKSPACE or wasteful) and max(reach):
            axis = reach.index(max(reach))
            half = shape[axis] // 2
            for low, high in ((0, half), (half, shape[axis])):
                part = target[(slice(None),) * axis + (slice(low, high),)]
                self._box(base, first + low * strides[axis], part.shape, strides, part)
            return
        data = self.take(span * size)
        self.fill(base, first, data)
        seen = _elements(data, size)
        target[...] = np.lib.stride_tricks.as_strided(seen, shape, tuple(step * size for step in strides))
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
                rows = self._rows_at_once(widths, (len(target) - done) // total, target.itemsize)
                taken = rows * total
                self._block(held, widths, row, target[done : done + taken].reshape(rows, total))
                row += rows
            done += taken

    @staticmethod
    def _rows_at_once(widths: Sequence[int], rows: int, size: int) -> int:
        return max(min(rows, WORKSPACE // (max(widths) * size)), 1)

    def _row(self, held: Columns, widths: Sequence[int], row: int, within: int, target: Array) -> None:
        column = 0
        for base, width in zip(held.bases, widths, strict=True):
            low, high = max(column, within), min(column + width, within + len(target))
            if low < high:
                self.fill(base, row * width + low - column, _bytes(target[low - within : high - within]))
            column += width

    def _block(self, held: Columns, widths: Sequence[int], row: int, target: Array) -> None:
        rows = len(target)
        if rows == 1:
            self._row(held, widths, row, 0, target[0])
            return
        column = 0
        for base, width in zip(held.bases, widths, strict=True):
            data = self.take(rows * width * target.itemsize)
            self.fill(base, row * width, data)
            target[:, column : column + width] = _elements(data, target.itemsize).reshape(rows, width)
            self.release(data)
            column += width

    # --- arithmetic ---

    def _made(self, entry: TensorEntry, held: Made, start: int, out: memoryview) -> None:
        op = arithmetic(held)
        metas = [meta(base) for base in held.bases]
        unit, size = op.unit(metas), entry.dtype.itemsize
        step = chunk_elements(entry, held, self._tile)
        state = self._state(held, op)
        stop = start + len(out) // size
        low = start - start % unit
        while low < stop:
            high = min(low + step, entry.numel, -(-stop // unit) * unit)
            inside = out[(low - start) * size : (high - start) * size] if low >= start and high <= stop else None
            made = inside if inside is not None else self.take((high - low) * size)
            self._apply(op, metas, held, state, low, as_array(made, entry.dtype))
            if inside is None:
                first, last = max(low, start), min(high, stop)
                out[(first - start) * size : (last - start) * size] = made[(first - low) * size : (last - low) * size]
                self.release(made)
            low = high

    def _apply(self, op: Arithmetic, metas: Sequence[Meta], held: Made, state: State, start: int, out: Array) -> None:
        ranges = op.ranges(metas, start, len(out))
        tiles = [self.view(base, first, count) for base, (first, count) in zip(held.bases, ranges, strict=True)]
        arrays = [as_array(tile, base.dtype) for tile, base in zip(tiles, held.bases, strict=True)]
        if self._device is not None and isinstance(op, Cast):
            self.overflowed += self._device.apply(op, arrays[0], out)
        else:
            self.overflowed += op.apply(state, arrays, start, out)
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


def single_extent(entry: TensorEntry, start: int, count: int) -> Extent | None:
    """Returns the one extent that holds elements ``[start, start + count)``, or None if they lie otherwise."""
    piece = next(pieces_in(entry.pieces, start, count), None)
    if piece is None or piece.start + piece.count < start + count:
        return None
    held, first, size = piece.held, start - piece.start, entry.dtype.itemsize
    if isinstance(held, Extent):
        return held.slice(first * size, count * size)
    if isinstance(held, View) and _in_order(held.shape, held.strides):
        return single_extent(held.base, held.offset + first, count)
    if isinstance(held, Columns) and held.rows == 1:
        for base in held.bases:
            if first < base.numel:
                return single_extent(base, first, count) if first + count <= base.numel else None
            first -= base.numel
    return None


def pieces_in(pieces: Sequence[Piece], start: int, count: int) -> Iterator[Piece]:
    """Yields the pieces that overlap elements ``[start, start + count)``; touches no other piece of a lazy sequence."""
    index = max(bisect_right(_Starts(pieces), start) - 1, 0)
    while index < len(pieces):
        piece = pieces[index]
        if piece.start >= start + count:
            return
        if piece.start + piece.count > start:
            yield piece
        index += 1


class _Starts(Sequence[int]):
    """The starts of the pieces as a sequence that computes only what a bisection asks for."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # bisect never slices
        return self._pieces[index].start


def _elements(data: memoryview, size: int) -> Array:
    """Returns bytes as elements that can be copied and not computed with."""
    return np.frombuffer(data, f"u{size}")


def _bytes(target: Array) -> memoryview:
    return target.reshape(-1).view(np.uint8).data


def _in_order(shape: Shape, strides: Sequence[int]) -> bool:
    """Tells whether a view's elements lie one behind the other."""
    expected = 1
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _is_plain(entry: TensorEntry) -> bool:
    """Tells whether short ranges cost no more than their bytes: nothing is computed or rearranged to make them."""
    held = entry.pieces[0].held if entry.pieces else None
    if isinstance(held, View):
        return _in_order(held.shape, held.strides) and _is_plain(held.base)
    if isinstance(held, Columns):
        return held.rows == 1 and all(_is_plain(base) for base in held.bases if base.numel)
    return isinstance(held, Extent)


def _run(shape: Shape, strides: Sequence[int]) -> int:
    """Returns how many elements lie one behind the other, at least, before the first jump."""
    run = 1
    for step, n in sorted(zip(strides, shape, strict=True)):
        if n > 1 and step != run:
            break
        run *= n
    return run
