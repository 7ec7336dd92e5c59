"""The geometry of strided views: what of a view lies together in what it is a view of. Numbers only.

Shapes and strides are in elements; strides are never negative, and 0 where an axis repeats itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from shardmerge.tensors import Shape, View, composed

# A page of memory and of the page cache, in bytes: what a shorter read costs anyway.
PAGE = 4096


def row_major(shape: Shape) -> tuple[int, ...]:
    """Returns the strides of elements that lie densely in their own order."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def place(index: Sequence[int], strides: Sequence[int]) -> int:
    """Returns how far behind the first element of a view another lies."""
    return sum(at * step for at, step in zip(index, strides, strict=True))


def blocks(shape: Shape, start: int, count: int) -> Iterator[tuple[Shape, Shape]]:
    """Yields elements ``[start, start + count)`` of a row-major order as blocks, in that order, as few as there can be.

    Returns
    -------
    index, sizes
        The first element of a block, an index an axis, and its shape: ones, then any number, then whole axes.
    """
    strides = row_major(shape)
    while count:
        axis = len(shape) - 1
        while axis > 0 and not start % strides[axis - 1] and count >= strides[axis - 1]:
            axis -= 1
        index = tuple(start // step % n for n, step in zip(shape, strides, strict=True))
        if axis < 0:  # a scalar
            yield index, shape
            return
        most = min(shape[axis] - index[axis], count // strides[axis])
        yield index, (*(1,) * axis, most, *shape[axis + 1 :])
        start, count = start + most * strides[axis], count - most * strides[axis]


def span(shape: Shape, strides: Sequence[int]) -> int:
    """Returns the elements from the first that a view sees to the last, those between included."""
    return sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1


def in_order(shape: Shape, strides: Sequence[int]) -> bool:
    """Tells whether a view's elements lie one behind the other."""
    return tail(shape, strides) == prod(shape)


def tail(shape: Shape, strides: Sequence[int]) -> int:
    """Returns how many elements of a view, at least, lie in its own order before the first jump."""
    length = 1
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and step != length:
            break
        length *= n
    return length


def run(shape: Shape, strides: Sequence[int]) -> int:
    """Returns how many elements lie one behind the other, in whatever order of the view, before the first jump."""
    return prod(shape[axis] for axis in _run_axes(shape, strides))


def _run_axes(shape: Shape, strides: Sequence[int]) -> list[int]:
    found, length = [], 1
    for step, n, axis in sorted(zip(strides, shape, range(len(shape)), strict=True)):
        if n > 1 and step != length:
            break
        if n > 1:
            found.append(axis)
        length *= n
    return found


def block(shape: Shape, strides: Sequence[int], itemsize: int) -> tuple[int, int] | None:
    """Returns what of a view is better made as a whole, or None where any range of it is read well.

    Rows that lie together for a page at least can be read one by one. Shorter ones, the columns of what a transposed
    matrix is a view of, share their pages with the rows beside them, until the last axes together see all that lies
    between their first element and their last: such a block has read every page it touches. A part of a transposed
    matrix never does; its block has the longest runs there are.

    Returns
    -------
    whole, row
        Elements of the smallest such block, and of one step of its outermost axis.
    """
    short = tail(shape, strides)
    if short * itemsize >= PAGE or short == prod(shape):
        return None
    dense = (axis for axis in reversed(range(len(shape))) if _block_is_dense(shape[axis:], strides[axis:], short))
    axis = next(dense, min(_run_axes(shape, strides), default=len(shape)))
    whole = prod(shape[axis:])
    return (whole, whole // shape[axis]) if whole > short else None


def _block_is_dense(shape: Shape, strides: Sequence[int], short: int) -> bool:
    return prod(shape) > short and 3 * span(shape, strides) <= 4 * prod(shape)


def direct(view: View) -> View:
    """Returns the same elements as a view of what the view's base is a view of, as far down as strides can say it."""
    base = composed(view.base)
    if not isinstance(base, View):
        return view
    found = _through(view, base)
    return view if found is None else direct(View(base.base, found[0], view.shape, found[1], view.recipe))


def _through(view: View, base: View) -> tuple[int, tuple[int, ...]] | None:
    """Returns offset and strides of a view of a view, or None where an axis goes on from a row of the base to the next.

    A stride is a number of steps along one axis of the base, the outermost that it is a whole step of; all axes that
    step along it must together stay within its size.
    """
    steps = row_major(base.shape)
    at = [view.offset // step % n for step, n in zip(steps, base.shape, strict=True)]
    room = [n - 1 - first for first, n in zip(at, base.shape, strict=True)]
    strides = []
    for n, stride in zip(view.shape, view.strides, strict=True):
        axis = next((i for i, step in enumerate(steps) if base.shape[i] > 1 and step <= stride), None)
        if n == 1 or stride == 0:
            strides.append(0)
        elif axis is None or stride % steps[axis] or room[axis] < stride // steps[axis] * (n - 1):
            return None
        else:
            room[axis] -= stride // steps[axis] * (n - 1)
            strides.append(stride // steps[axis] * base.strides[axis])
    return base.offset + sum(first * step for first, step in zip(at, base.strides, strict=True)), tuple(strides)
