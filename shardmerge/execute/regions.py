"""Views, boxes and columns: reads what a range of elements lies in and puts it in order, run by run or in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from shardmerge.dtypes import DType
from shardmerge.execute.ranges import Ranges
from shardmerge.execute.rearrange import rearrange
from shardmerge.execute.tiling import Tiling
from shardmerge.ops.arrays import Array
from shardmerge.plan.memory import KEPT_TILINGS, WORKSPACE, column_elements
from shardmerge.tensors import Boxes, Columns, Extent, Shape, Strided, TensorEntry, View, dense
from shardmerge.tensors.pieces import is_plain, single_extent
from shardmerge.tensors.strides import blocks, direct, in_order, place, run, span

# Runs of a view are read one by one, and not with what lies between them, where that saves a quarter of the bytes and
# either they are this long, half a page, or what lies between them is: a read of its own costs as much time as copying
# 8 KiB (2.7 us against 0.3 us a KiB).
_RUN = 2 << 10
_GAP = 8 << 10

# What lies between runs is read ahead with them where it is at most so many times as much: it is the next band's, and
# cold, one large request to the disk was 2.5 times as fast as 4,096 of 8 KiB.
_MOST_AHEAD = 8

# Most runs that are listed at a time, in Python objects.
_MOST_RUNS = 1024


class Regions:
    """Fills ranges of views, boxes and columns for an assembler, which reads what they lie in."""

    def __init__(self, assembler: Ranges) -> None:
        self._assembler = assembler
        self._tilings: dict[int, Tiling] = {}

    def fill(self, dtype: DType, held: Strided | Boxes | View | Columns, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes of a tensor so held from its element ``start`` on."""
        target = _elements(out, dtype.itemsize)
        if isinstance(held, Columns):
            self._columns(held, start, target)
        elif isinstance(held, Boxes):
            self._boxes(dtype, held, start, target)
        elif isinstance(held, Strided):
            self._strided(_whole(dtype, held.extent), 0, held.shape, held.strides, start, target)
        else:
            held = direct(held)
            self._strided(held.base, held.offset, held.shape, held.strides, start, target)

    # --- views ---

    def _strided(
        self, base: TensorEntry, offset: int, shape: Shape, strides: Sequence[int], start: int, target: Array
    ) -> None:
        """Block by block: partial rows, and whole ones together."""
        for index, sizes in blocks(shape, start, len(target)):
            part, target = target[: prod(sizes)], target[prod(sizes) :]
            self._block(base, offset + place(index, strides), sizes, strides, part.reshape(sizes))

    def _block(self, base: TensorEntry, first: int, shape: Shape, strides: Sequence[int], target: Array) -> None:
        """Reads what a block lies in and rearranges it: run by run, or all of it, in halves where that is too much."""
        size = base.dtype.itemsize
        reach = span(shape, strides)
        if reach == target.size and in_order(shape, strides) and target.flags.c_contiguous:
            self._assembler.fill(base, first, _bytes(target))
            return
        apart = _read_apart(base, shape, strides)
        much = min(WORKSPACE // size, _MOST_RUNS * run(shape, strides)) if apart else WORKSPACE // size
        if (target.size if apart else reach) > much and reach > 1:
            steps = [(n - 1) * step for n, step in zip(shape, strides, strict=True)]
            axis = steps.index(max(steps))
            half = shape[axis] // 2
            for low, high in ((0, half), (half, shape[axis])):
                part = target[(slice(None),) * axis + (slice(low, high),)]
                self._block(base, first + low * strides[axis], part.shape, strides, part)
            return
        if apart:
            self._runs(base, first, shape, strides, target)
            return
        data = self._assembler.view(base, first, reach)
        rearrange(target, _strided(_elements(data, size), shape, strides))
        self._assembler.release(data)

    def _runs(self, base: TensorEntry, first: int, shape: Shape, strides: Sequence[int], target: Array) -> None:
        """Reads the runs of a block one by one, side by side, and puts them where they belong."""
        size, length = base.dtype.itemsize, run(shape, strides)
        starts, packed = np.full(1, first, np.int64), list(strides)
        for axis in sorted(range(len(shape)), key=lambda axis: -strides[axis]):
            if strides[axis] >= length and shape[axis] > 1:  # not within a run
                packed[axis] = target.size // (len(starts) * shape[axis])
                starts = np.add.outer(starts, np.arange(shape[axis], dtype=np.int64) * strides[axis]).reshape(-1)
        data = self._assembler.take(target.nbytes)
        parts = [data[at : at + length * size] for at in range(0, target.nbytes, length * size)]
        extent = single_extent(base, first, span(shape, strides))
        if extent is None:
            for start, part in zip(starts.tolist(), parts, strict=True):
                self._assembler.fill(base, start, part)
        else:
            offsets = extent.offset + (starts - first) * size
            if _MOST_AHEAD * target.nbytes >= extent.nbytes:
                self._assembler.pool.expect(extent.file, extent.offset, extent.nbytes)
            self._assembler.pool.read_runs(extent.file, offsets.tolist(), parts)
        rearrange(target, _strided(_elements(data, size), shape, packed))
        self._assembler.release(data)

    # --- boxes ---

    def _boxes(self, dtype: DType, held: Boxes, start: int, target: Array) -> None:
        """Block by block, from every box that a block meets: what both have lies in a row in a box that is dense."""
        tiling = self._tiling(held)
        for index, sizes in blocks(held.shape, start, len(target)):
            whole, target = target[: prod(sizes)].reshape(sizes), target[prod(sizes) :]
            for met in tiling.meet(index, sizes):
                part, held_by = whole[met.part], met.box.held
                if isinstance(held_by, Strided):
                    self._block(_whole(dtype, held_by.extent), met.start, part.shape, held_by.strides, part)
                else:
                    self._dense(held_by, met.start, part)

    def _dense(self, extent: Extent, start: int, target: Array) -> None:
        """Elements of an extent one behind the other: read in place where they belong so, else copied, in halves."""
        if target.flags.c_contiguous:
            self._assembler.pool.read_into(extent.file, extent.offset + start * target.itemsize, _bytes(target))
        elif target.nbytes > WORKSPACE:
            axis = next(axis for axis, n in enumerate(target.shape) if n > 1)
            for part in np.array_split(target, 2, axis):
                self._dense(extent, start, part)
                start += part.size
        else:
            data = self._assembler.take(target.nbytes)
            self._assembler.pool.read_into(extent.file, extent.offset + start * target.itemsize, data)
            target[...] = _elements(data, target.itemsize).reshape(target.shape)
            self._assembler.release(data)

    def _tiling(self, held: Boxes) -> Tiling:
        found = self._tilings.get(id(held))
        if found is None:
            if len(self._tilings) == KEPT_TILINGS:
                self._tilings.clear()
            found = self._tilings[id(held)] = Tiling(held)
        return found

    # --- columns ---

    def _columns(self, held: Columns, start: int, target: Array) -> None:
        """Tensors side by side: whole rows in blocks, partial rows base by base."""
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
                self._rows(held, widths, row, target[done : done + taken].reshape(rows, total))
                row += rows
            done += taken

    def _row(self, held: Columns, widths: Sequence[int], row: int, within: int, target: Array) -> None:
        column = 0
        for base, width in zip(held.bases, widths, strict=True):
            low, high = max(column, within), min(column + width, within + len(target))
            if low < high:
                self._assembler.fill(base, row * width + low - column, _bytes(target[low - within : high - within]))
            column += width

    def _rows(self, held: Columns, widths: Sequence[int], row: int, target: Array) -> None:
        column = 0
        for base, width in zip(held.bases, widths, strict=True):
            step = max(column_elements(base, self._assembler.tile) // max(width, 1), 1)
            for low in range(0, len(target), step):
                self._column(base, row + low, target[low : low + step, column : column + width])
            column += width

    def _column(self, base: TensorEntry, row: int, target: Array) -> None:
        """Fills a part of some rows; directly where it is of one, since that may be of any length."""
        rows, width = target.shape
        if rows == 1:
            self._assembler.fill(base, row * width, _bytes(target[0]))
            return
        data = self._assembler.view(base, row * width, rows * width)
        target[...] = _elements(data, target.itemsize).reshape(rows, width)
        self._assembler.release(data)


def _whole(dtype: DType, extent: Extent) -> TensorEntry:
    numel = extent.nbytes // dtype.itemsize
    return TensorEntry("", dtype, (numel,), dense(extent, numel))


def _elements(data: memoryview, size: int) -> Array:
    """Returns bytes as elements that can be copied and not computed with."""
    return np.frombuffer(data, f"u{size}")


def _bytes(target: Array) -> memoryview:
    return target.reshape(-1).view(np.uint8).data


def _read_apart(base: TensorEntry, shape: Shape, strides: Sequence[int]) -> bool:
    """Tells whether the runs of a block are read for themselves, without what lies between them."""
    seen, reach = prod(shape), span(shape, strides)
    if 4 * seen >= 3 * reach or not is_plain(base):
        return False
    if any(step == 0 and n > 1 for n, step in zip(shape, strides, strict=True)):
        return False
    length = run(shape, strides)
    if prod(n for n, step in zip(shape, strides, strict=True) if step < length) != length:  # runs that overlap
        return False
    gap = (reach - seen) // max(seen // length - 1, 1)
    return length * base.dtype.itemsize >= _RUN or gap * base.dtype.itemsize >= _GAP


def _strided(elements: Array, shape: Shape, strides: Sequence[int]) -> Array:
    size = elements.itemsize
    return np.lib.stride_tricks.as_strided(elements, shape, tuple(step * size for step in strides), writeable=False)
