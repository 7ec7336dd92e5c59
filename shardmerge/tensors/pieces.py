"""Where a range of a tensor lies: which pieces hold it, and whether one extent does."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from shardmerge.tensors import Boxes, Columns, Extent, Piece, TensorEntry, View
from shardmerge.tensors.strides import in_order


def single_extent(entry: TensorEntry, start: int, count: int) -> Extent | None:
    """Returns the one extent that holds elements ``[start, start + count)``, or None if they lie otherwise."""
    piece = next(pieces_in(entry.pieces, start, count), None)
    if piece is None or piece.start + piece.count < start + count:
        return None
    held, first, size = piece.held, start - piece.start, entry.dtype.itemsize
    if isinstance(held, Extent):
        return held.slice(first * size, count * size)
    if isinstance(held, View) and in_order(held.shape, held.strides):
        return single_extent(held.base, held.offset + first, count)
    if isinstance(held, Columns) and held.rows == 1:
        for base in held.bases:
            if first < base.numel:
                return single_extent(base, first, count) if first + count <= base.numel else None
            first -= base.numel
    return None


def pieces_in(pieces: Sequence[Piece], start: int, count: int) -> Iterator[Piece]:
    """Yields the pieces that overlap elements ``[start, start + count)``; touches no other piece of a lazy sequence."""
    index = max(bisect_right(pieces, start, key=_start) - 1, 0) if len(pieces) > 1 else 0
    while index < len(pieces):
        piece = pieces[index]
        if piece.start >= start + count:
            return
        if piece.start + piece.count > start:
            yield piece
        index += 1


def _start(piece: Piece) -> int:
    return piece.start


def is_plain(entry: TensorEntry) -> bool:
    """Tells whether short ranges cost no more than their bytes: nothing is computed or rearranged to make them."""
    held = entry.pieces[0].held if entry.pieces else None
    if isinstance(held, View):
        return in_order(held.shape, held.strides) and is_plain(held.base)
    if isinstance(held, Columns):
        return held.rows == 1 and all(is_plain(base) for base in held.bases if base.numel)
    return isinstance(held, Extent) or (isinstance(held, Boxes) and held.view is None)
