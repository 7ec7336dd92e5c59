"""Shapes of an op's inputs: axes, strides, and the error for those that it cannot take. Sizes are in elements."""

from __future__ import annotations

from math import prod

from shardmerge.errors import MappingError
from shardmerge.ops.contract import Shape


def row_major(shape: Shape) -> tuple[int, ...]:
    """Returns the strides of a dense tensor, in elements."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def odd_shape(what: str, found: object, expected: str) -> MappingError:
    """Returns the error of an input that an op cannot take."""
    return MappingError("op-shape", what, found=str(found), expected=expected)


def axis_of(dim: int, rank: int, what: str) -> int:
    """Returns a non-negative axis."""
    if not -rank <= dim < rank:
        raise odd_shape(f"{what}: there is no dim {dim}", f"{rank} dimensions", f"a dim from {-rank} to {rank - 1}")
    return dim % rank


def axis_word(dim: int, rank: int) -> str:
    """Returns what people call what lies along an axis: ``rows``, ``columns``, ``dim 2``."""
    axis = dim % rank
    if axis == 0:
        return "rows"
    return "columns" if rank == 2 else f"dim {axis}"
