"""Assembles a range of a tensor from its pieces, in row-major order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from shardmerge.memory import STRIDED_WORKSPACE
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Extent, Piece, Strided, TensorEntry


def single_extent(entry: TensorEntry, start: int, count: int) -> Extent | None:
    """Returns the one extent that holds elements ``[start, start + count)``, or None if several or a view do."""
    first = next(pieces_in(entry.pieces, start, count), None)
    if first is None or not isinstance(first.held, Extent) or first.start + first.count < start + count:
        return None
    size = entry.dtype.itemsize
    return first.held.slice((start - first.start) * size, count * size)


def gather(pool: FilePool, entry: TensorEntry, start: int, out: memoryview) -> None:
    """Fills ``out`` with the bytes of the tensor from element ``start`` on.

    Parameters
    ----------
    pool
        Where files are read.
    entry
        The tensor.
    start
        First element, row-major.
    out
        Writable bytes, a multiple of the item size long.
    """
    size = entry.dtype.itemsize
    count = len(out) // size
    for piece in pieces_in(entry.pieces, start, count):
        low = max(start, piece.start)
        high = min(start + count, piece.start + piece.count)
        target = out[(low - start) * size : (high - start) * size]
        if isinstance(piece.held, Extent):
            part = piece.held.slice((low - piece.start) * size, (high - low) * size)
            pool.read_into(part.file, part.offset, target)
        else:
            _gather_strided(pool, piece.held, size, low - piece.start, target)


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


def _gather_strided(pool: FilePool, view: Strided, size: int, start: int, out: memoryview) -> None:
    """Fills ``out`` from a strided view: whole outer rows as one box, partial rows by going one axis in."""
    target = np.frombuffer(out, np.uint8).reshape(-1, size)
    _fill(pool, view.extent, view.shape, view.strides, 0, start, target)


def _fill(
    pool: FilePool,
    extent: Extent,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    base: int,
    start: int,
    target: np.ndarray[tuple[int, int], np.dtype[np.uint8]],
) -> None:
    if not len(target):
        return
    if not shape:
        _read_run(pool, extent, base, 1, 1, target)
        return
    inner = prod(shape[1:])
    row, within = divmod(start, inner)
    if within or len(target) < inner:  # a partial row first
        take = min(inner - within, len(target))
        _fill(pool, extent, shape[1:], strides[1:], base + row * strides[0], within, target[:take])
        _fill(pool, extent, shape, strides, base, start + take, target[take:])
        return
    rows = len(target) // inner
    box = (rows, *shape[1:])
    _fill_box(pool, extent, box, strides, base + row * strides[0], target[: rows * inner])
    _fill(pool, extent, shape, strides, base, start + rows * inner, target[rows * inner :])


def _fill_box(
    pool: FilePool,
    extent: Extent,
    box: tuple[int, ...],
    strides: tuple[int, ...],
    base: int,
    target: np.ndarray[tuple[int, int], np.dtype[np.uint8]],
) -> None:
    """Reads a box in the order of memory, so that a transposed tensor costs one read a column, not one an element."""
    size = target.shape[1]
    order = sorted(range(len(box)), key=lambda axis: -strides[axis])
    shaped = target.reshape(*box, size).transpose(*order, len(box))
    sizes = tuple(box[axis] for axis in order)
    steps = tuple(strides[axis] for axis in order)
    for outer in np.ndindex(sizes[:-1]):
        first = base + sum(i * step for i, step in zip(outer, steps, strict=False))
        run = np.empty((sizes[-1], size), np.uint8)
        _read_run(pool, extent, first, sizes[-1], steps[-1], run)
        shaped[outer] = run


def _read_run(
    pool: FilePool,
    extent: Extent,
    first: int,
    count: int,
    step: int,
    run: np.ndarray[tuple[int, int], np.dtype[np.uint8]],
) -> None:
    """Reads ``count`` elements ``step`` apart; step 0 is an expanded axis, one element repeated."""
    size = run.shape[1]
    most = 1 if step * size >= _PAGE else max(STRIDED_WORKSPACE // max(step * size, size), 1)
    done = 0
    while done < count:
        take = min(most, count - done) if step else count
        data = bytearray(((take - 1) * step + 1) * size)
        part = extent.slice((first + done * step) * size, len(data))
        pool.read_into(part.file, part.offset, memoryview(data))
        elements = np.frombuffer(data, np.uint8).reshape(-1, size)
        run[done : done + take] = elements[::step] if step else elements
        done += take


# Elements further apart than this are read one by one: the bytes between them would cost more than the calls.
_PAGE = 4096
