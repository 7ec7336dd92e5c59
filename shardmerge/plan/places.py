"""Where the elements of a tensor come from, whatever moves it was made by. Pure.

Moves and casts go through: what is left is elements of files, and elements of what is computed, at their places in the
tensor. Two plans that move the same elements to the same places have the same ones, in other parts and another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from shardmerge.ops.casts import Cast
from shardmerge.plan.walks import MOST, TooScattered, Walk, cut, folded, last, moved, unfolded, whole
from shardmerge.tensors import Boxes, Columns, Extent, Held, Made, Strided, TensorEntry, View
from shardmerge.tensors.pieces import pieces_in
from shardmerge.tensors.ranges import FlatRanges
from shardmerge.tensors.ranks import RankChunks
from shardmerge.tensors.strides import direct, row_major


@dataclass(frozen=True, slots=True)
class Steps:
    """Elements of a file, or of something computed.

    Attributes
    ----------
    of
        The file's path, or what is computed.
    casts
        What is done to each element alone: ``F32>BF16``, the last one first.
    walk
        Over bytes of the file, or over elements of what is computed; one axis.
    """

    of: str | Made | View
    casts: str
    walk: Walk


@dataclass(frozen=True, slots=True)
class Shares:
    """All elements of a tensor that files hold one behind the other, in their order, from element ``at`` on.

    Ranges of any lengths, or the equal shares of ranks.
    """

    of: RankChunks | FlatRanges
    casts: str
    at: int


PlacedElements: TypeAlias = "Steps | Shares"


def places(entry: TensorEntry) -> Iterator[PlacedElements]:
    """Yields where all elements of a tensor come from."""
    return _places(entry, whole(entry.numel), "")


def _places(entry: TensorEntry, walk: Walk, casts: str) -> Iterator[PlacedElements]:
    if (
        isinstance(entry.pieces, RankChunks | FlatRanges)
        and walk.index == (0,)
        and walk.loops == whole(entry.numel).loops
    ):
        yield Shares(entry.pieces, casts, walk.at)
        return
    if len(entry.pieces) == 1:
        yield from _held(entry, entry.pieces[0].held, walk, casts)
        return
    first = walk.index[0]
    for piece in pieces_in(entry.pieces, first, last(walk, 0) + 1 - first):
        for part in cut(walk, 0, piece.start, piece.start + piece.count):
            yield from _held(entry, piece.held, moved(part, (-piece.start,)), casts)


def _held(entry: TensorEntry, held: Held, walk: Walk, casts: str) -> Iterator[PlacedElements]:
    if isinstance(held, (Extent, Strided)):
        yield from _file(held, entry.dtype.itemsize, walk, casts)
    elif isinstance(held, Boxes):
        for part in unfolded(walk, held.shape):
            yield from _boxes(held, entry.dtype.itemsize, part, casts)
    elif isinstance(held, Columns):
        yield from _columns(held, walk, casts)
    elif isinstance(held, View):
        yield from _view(direct(held), walk, casts)
    elif isinstance(held.recipe, Cast):
        (base,) = held.bases
        yield from _places(base, walk, f"{casts}{held.recipe.target}<{held.recipe.source} ")
    else:
        yield Steps(held, casts, walk)


def _file(held: Extent | Strided, size: int, walk: Walk, casts: str) -> Iterator[PlacedElements]:
    """From elements in the order of what is held to bytes of the file."""
    if isinstance(held, Extent):
        yield Steps(held.file, casts, folded(walk, held.offset, (size,)))
        return
    strides = [step * size for step in held.strides]
    for part in unfolded(walk, held.shape):
        yield Steps(held.extent.file, casts, folded(part, held.extent.offset, strides))


def _boxes(held: Boxes, size: int, walk: Walk, casts: str) -> Iterator[PlacedElements]:
    for box in held.boxes:
        parts = [walk]
        for axis, (low, n) in enumerate(zip(box.offsets, box.shape, strict=True)):
            parts = [one for part in parts for one in cut(part, axis, low, low + n)]
        for part in parts:
            inside = moved(part, [-low for low in box.offsets])
            yield from _file(box.held, size, folded(inside, 0, row_major(box.shape)), casts)


def _columns(held: Columns, walk: Walk, casts: str) -> Iterator[PlacedElements]:
    widths = [base.numel // held.rows for base in held.bases]
    for part in unfolded(walk, (held.rows, sum(widths))):
        column = 0
        for base, width in zip(held.bases, widths, strict=True):
            for one in cut(part, 1, column, column + width):
                yield from _places(base, folded(one, -column, (width, 1)), casts)
            column += width


def _view(view: View, walk: Walk, casts: str) -> Iterator[PlacedElements]:
    """Through to what is seen; where the view's rows and those of what it sees do not fit together, to the view."""
    try:
        found = list(islice(_through(view, walk, casts), MOST + 1))
    except TooScattered:
        found = []
    if 0 < len(found) <= MOST:
        yield from found
    else:
        yield Steps(view, casts, walk)


def _through(view: View, walk: Walk, casts: str) -> Iterator[PlacedElements]:
    for part in unfolded(walk, view.shape):
        yield from _places(view.base, folded(part, view.offset, view.strides), casts)
