"""Tensors cut into boxes: whether they tile the shape exactly once, and the pieces that they are. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, product
from math import prod

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError
from shardmerge.tensors.entries import Box, Boxes, Extent, Piece, Shape, Strided
from shardmerge.tensors.ranges import FlatRanges
from shardmerge.tensors.strides import place, row_major, span

# Most corners that are summed up. 16,384 boxes may be cut along six axes; no mesh of devices has more, and a file that
# lies must not cost more than a few seconds.
_MOST_CORNERS = 1 << 20


def boxed(dtype: DType, shape: Shape, boxes: Iterable[Box], where: str = "") -> Sequence[Piece]:
    """Returns the pieces of a tensor that lies in boxes.

    A tensor cut into whole rows is flat ranges, which are read and copied as they lie. Any other is one piece, held by
    ``Boxes``. Boxes without elements are left out, wherever they lie: torch writes them behind the end of an axis that
    has fewer rows than there are ranks.

    Parameters
    ----------
    dtype, shape
        Of the tensor.
    boxes
        In any order.
    where
        The tensor, for errors.

    Raises
    ------
    CheckpointError
        As ``check_tiling``.
    """
    kept = sorted((box for box in boxes if prod(box.shape)), key=_offsets)
    check_tiling(shape, kept, where)
    for box in kept:
        _check_size(dtype, box)
    if not kept:
        return ()
    if len(kept) == 1:
        return (Piece(0, prod(shape), kept[0].held),)
    # Views stay boxes: the memory law takes the first piece of a tensor for what all of them are.
    if all(isinstance(box.held, Extent) and _is_flat(shape, box.shape) for box in kept):
        return _ranges(dtype, shape, kept)
    return (Piece(0, prod(shape), Boxes(shape, tuple(kept))),)


def _ranges(dtype: DType, shape: Shape, boxes: Sequence[Box]) -> FlatRanges:
    strides, files = row_major(shape), dict[str, int]()
    starts, which, offsets = array("q"), array("i"), array("q")
    for box in boxes:
        assert isinstance(box.held, Extent)
        starts.append(place(box.offsets, strides))
        which.append(files.setdefault(box.held.file, len(files)))
        offsets.append(box.held.offset)
    starts.append(prod(shape))
    return FlatRanges(tuple(files), dtype.itemsize, starts, which, offsets)


def check_tiling(shape: Shape, boxes: Sequence[Box], where: str = "") -> None:
    """Checks that boxes, none of them empty, hold every element of a shape exactly once.

    Takes as long as there are boxes, times two for each axis that is cut. How often elements are held is a function on
    the shape, and its differences along all axes say all of it: those of a box are +1 and -1 at its corners. So boxes
    tile the shape if and only if the corners of all of them cancel each other, but for those of the shape itself.

    Raises
    ------
    CheckpointError
        ``box-outside``: a box with other axes than the shape, or beyond it. ``box-hole``: an element in no box.
        ``box-overlap``: one in several. ``box-cuts``: more corners than are summed up.
    """
    for box in boxes:
        _check_inside(shape, box, where)
    if not prod(shape):
        return
    cut = [axis for axis, n in enumerate(shape) if any(box.shape[axis] != n for box in boxes)]
    if len(boxes) << len(cut) > _MOST_CORNERS:
        raise CheckpointError(
            "box-cuts",
            "a tensor is cut along more axes than its boxes can be checked for",
            where=where,
            found=f"{len(boxes):,} boxes, cut along {len(cut)} axes",
            expected=f"at most {_MOST_CORNERS:,} corners",
        )
    corners = _corners(shape, boxes, cut)
    if corners:  # in row-major order, nothing before the first of them is wrong
        first = min(corners)
        point = [0] * len(shape)
        for axis, at in zip(cut, first, strict=True):
            point[axis] = at
        raise _misfit(point, boxes, where)


def _corners(shape: Shape, boxes: Sequence[Box], cut: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Returns the corners that do not cancel, on the axes that are cut, each with how often it is held too much."""
    signs = [prod(ends) for ends in product((1, -1), repeat=len(cut))]
    found: dict[tuple[int, ...], int] = {}
    whole = [((0,) * len(shape), shape, -1)]
    for offsets, sizes, weight in chain(whole, ((box.offsets, box.shape, 1) for box in boxes)):
        ends = ((offsets[axis], offsets[axis] + sizes[axis]) for axis in cut)
        for corner, sign in zip(product(*ends), signs, strict=True):
            count = found.pop(corner, 0) + weight * sign
            if count:
                found[corner] = count
    return found


def _check_inside(shape: Shape, box: Box, where: str) -> None:
    same = len(box.offsets) == len(box.shape) == len(shape)
    if same and all(0 <= at <= at + n <= m for at, n, m in zip(box.offsets, box.shape, shape, strict=True)):
        return
    raise CheckpointError(
        "box-outside",
        "a box does not lie within its tensor",
        where=where,
        found=_shown(box),
        expected=f"a part of {list(shape)}",
    )


def _misfit(point: Sequence[int], boxes: Sequence[Box], where: str) -> CheckpointError:
    holding = [
        box
        for box in boxes
        if all(low <= at < low + n for at, low, n in zip(point, box.offsets, box.shape, strict=True))
    ]
    if not holding:
        code, what, found = "box-hole", "part of a tensor lies in none of its boxes", "none"
    else:
        code, what = "box-overlap", "boxes of a tensor overlap"
        found = " and ".join(_shown(box) for box in holding[:2]) + (", and more" if len(holding) > 2 else "")
    return CheckpointError(code, what, where=where, found=found, expected=f"one box that holds element {list(point)}")


def _shown(box: Box) -> str:
    file = box.held.file if isinstance(box.held, Extent) else box.held.extent.file
    return f"{list(box.shape)} at {list(box.offsets)} in {file}"


def _check_size(dtype: DType, box: Box) -> None:
    if isinstance(box.held, Extent):
        held, needed = box.held.nbytes, prod(box.shape)
    else:
        held, needed = box.held.extent.nbytes, span(box.shape, box.held.strides)
    if held != needed * dtype.itemsize or (isinstance(box.held, Strided) and box.held.shape != box.shape):
        raise ValueError(f"a box {_shown(box)} is held by {held} bytes of {dtype}")


def _is_flat(shape: Shape, box: Shape) -> bool:
    """Tells whether the elements of a box lie one behind the other in the tensor."""
    axis = next((axis for axis, n in enumerate(box) if n > 1), len(box))
    return box[axis + 1 :] == shape[axis + 1 :]


def _offsets(box: Box) -> tuple[int, ...]:
    return box.offsets
