"""The geometry of strided views: what of a view lies together in what it is a view of. Numbers only.

Shapes and strides are in elements; strides are never negative, and 0 where an axis repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from shardmerge.tensors import Shape

# A page of memory and of the page cache, in bytes: what a shorter read costs anyway.
PAGE = 4096


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
    length = 1
    for step, n in sorted(zip(strides, shape, strict=True)):
        if n > 1 and step != length:
            break
        length *= n
    return length


def block(shape: Shape, strides: Sequence[int], itemsize: int) -> tuple[int, int] | None:
    """Returns what of a view is better made as a whole, or None where any range of it is read well.

    Rows that lie together for a page at least can be read one by one. Shorter ones, the columns of what a transposed
    matrix is a view of, share their pages with the rows beside them, until the last axes together see all that lies
    between their first element and their last: such a block has read every page it touches.

    Returns
    -------
    whole, row
        Elements of the smallest such block, and of one step of its outermost axis.
    """
    short = tail(shape, strides)
    if short * itemsize >= PAGE or short == prod(shape):
        return None
    for axis in reversed(range(len(shape))):
        whole = prod(shape[axis:])
        if whole > short and 3 * span(shape[axis:], strides[axis:]) <= 4 * whole:
            return whole, whole // shape[axis]
    return None
