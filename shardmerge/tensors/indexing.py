"""A basic index, as of numpy, as ranges: integers, slices and an ellipsis."""

from __future__ import annotations

from operator import index as whole_number
from typing import TypeAlias

from shardmerge.tensors.entries import Shape

Index: TypeAlias = "int | slice | ellipsis | tuple[int | slice | ellipsis, ...]"  # noqa: F821  # builtin of the stubs


def indexed(index: Index, shape: Shape) -> tuple[list[range], list[bool]]:
    """Returns one range an axis, and whether the axis stays (a slice) or goes (an integer).

    Raises
    ------
    IndexError
        Out of bounds, more indices than axes, two ellipses.
    TypeError
        An index of another type.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    ellipses = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    missing = len(shape) - len(items) + len(ellipses)
    if missing < 0:
        raise IndexError(f"too many indices: the tensor has {len(shape)} dimensions, and {len(items)} were indexed")
    at = ellipses[0] if ellipses else len(items)
    items[at : at + len(ellipses)] = [slice(None)] * missing
    found = [_range(item, size) for item, size in zip(items, shape, strict=True)]
    return found, [isinstance(item, slice) for item in items]


def _range(item: object, size: int) -> range:
    if isinstance(item, slice):
        return range(*item.indices(size))
    place = _place(item)
    if not -size <= place < size:
        raise IndexError(f"index {place} is out of bounds for a dimension of size {size}")
    return range(place % size, place % size + 1)


def _place(item: object) -> int:
    kind = type(item).__name__
    try:
        if kind not in ("bool", "bool_"):  # a mask to numpy, though a number to Python
            return whole_number(item)  # type: ignore[arg-type]  # what is no number is the error
    except TypeError:
        pass
    what = "only integers, slices and an ellipsis index a tensor that is not in memory"
    raise TypeError(f"{what}, not {kind}; tensor.numpy()[...] takes all of numpy's indices")
