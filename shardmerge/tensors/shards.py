"""Tensors that were cut over ranks, put together again: which part of a rank's shard is which part of the whole. Pure.

A shard is an entry of its own, and its elements lie in flat ranges or in a view; a part of it is a box. So is what
tensor parallelism cuts: rows, columns, and the same of each of several matrices that stand one below the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from shardmerge.dtypes import DType
from shardmerge.tensors.boxes import boxed, check_tiling
from shardmerge.tensors.entries import Box, Boxes, Extent, Piece, Shape, Strided, TensorEntry
from shardmerge.tensors.strides import blocks, in_order, place, row_major, span


@dataclass(frozen=True, slots=True)
class ShardPart:
    """A box of a rank's shard, and where in the whole tensor its elements belong.

    Attributes
    ----------
    rank
        Whose shard.
    shape
        In elements, an axis each; the same on both sides.
    inside, at
        Its first element in the shard, and in the whole tensor, an index an axis.
    """

    rank: int
    shape: Shape
    inside: tuple[int, ...]
    at: tuple[int, ...]


def assembled(
    dtype: DType, shape: Shape, shards: Sequence[TensorEntry], parts: Sequence[ShardPart], where: str = ""
) -> Sequence[Piece]:
    """Returns the pieces of a whole tensor.

    Parts that several ranks hold are taken from the first of these.

    Parameters
    ----------
    dtype, shape
        Of the whole tensor, which has as many axes as its shards.
    shards
        By rank; all that have elements of that dtype.
    parts
        Of all of them.
    where
        The tensor, for errors.

    Raises
    ------
    CheckpointError
        As ``check_tiling``: for the parts in the whole, and in each shard.
    """
    for rank, shard in enumerate(shards):
        mine = [part for part in parts if part.rank == rank and 0 not in part.shape]
        held = Extent(f"rank {rank}", 0, 0)  # a name for errors; only the places are compared
        check_tiling(shard.shape, [Box(part.inside, part.shape, held) for part in mine], where)
    firsts = {(part.at, part.shape): part for part in reversed(parts)}
    found = (box for part in firsts.values() for box in part_boxes(shards[part.rank], part, part.at))
    return boxed(dtype, shape, found, where)


def part_entry(shard: TensorEntry, part: ShardPart) -> TensorEntry:
    """Returns a part of a shard as a tensor of its own."""
    boxes = part_boxes(shard, part, (0,) * len(part.shape))
    return TensorEntry(shard.name, shard.dtype, part.shape, boxed(shard.dtype, part.shape, boxes, shard.name))


def part_boxes(shard: TensorEntry, part: ShardPart, at: tuple[int, ...]) -> Iterator[Box]:
    """Yields the boxes that hold a part of a shard, at their places in a tensor where the part begins at ``at``."""
    for box in _boxes(shard):
        cut = _common(box, part, shard.dtype.itemsize)
        if cut is not None:
            places = zip(cut.offsets, part.inside, at, strict=True)
            yield Box(tuple(first - inside + to for first, inside, to in places), cut.shape, cut.held)


def element_place(entry: TensorEntry, index: int) -> tuple[str, int]:
    """Returns the file and the byte at which an element of a tensor in files lies, by its row-major number."""
    piece = next(piece for piece in entry.pieces if piece.start <= index < piece.start + piece.count)
    held, at = piece.held, index - piece.start
    if isinstance(held, Extent):
        return held.file, held.offset + at * entry.dtype.itemsize
    one = (1,) * len(entry.shape)
    point = tuple(index // step % n for step, n in zip(row_major(entry.shape), entry.shape, strict=True))
    (box,) = part_boxes(entry, ShardPart(0, one, point, (0,) * len(point)), (0,) * len(point))
    assert isinstance(box.held, Extent)  # of one element
    return box.held.file, box.held.offset


def _boxes(entry: TensorEntry) -> Iterator[Box]:
    """Yields the elements of a tensor as boxes: a flat range is at most so many as it has axes, twice."""
    for piece in entry.pieces:
        if isinstance(piece.held, Boxes):
            yield from piece.held.boxes
        elif isinstance(piece.held, Strided):
            yield Box((0,) * len(entry.shape), entry.shape, piece.held)
        else:
            assert isinstance(piece.held, Extent)  # a checkpoint's own tensors are not made of others
            start, size = 0, entry.dtype.itemsize
            for index, shape in blocks(entry.shape, piece.start, piece.count):
                yield Box(index, shape, piece.held.slice(start, prod(shape) * size))
                start += prod(shape) * size


def _common(box: Box, part: ShardPart, itemsize: int) -> Box | None:
    """Returns what a box and a part of a shard have in common."""
    low = tuple(map(max, box.offsets, part.inside))
    ends = zip(box.offsets, box.shape, part.inside, part.shape, strict=True)
    high = tuple(min(first + n, other + m) for first, n, other, m in ends)
    shape: Shape = tuple(end - first for first, end in zip(low, high, strict=True))
    if any(n <= 0 for n in shape):
        return None
    strides = box.held.strides if isinstance(box.held, Strided) else row_major(box.shape)
    whole = box.held.extent if isinstance(box.held, Strided) else box.held
    first = place([at - start for at, start in zip(low, box.offsets, strict=True)], strides)
    extent = whole.slice(first * itemsize, span(shape, strides) * itemsize)
    return Box(low, shape, extent if in_order(shape, strides) else Strided(extent, shape, strides))
