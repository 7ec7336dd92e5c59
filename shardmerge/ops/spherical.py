"""Spherical interpolation between two tensors, with the semantics of mergekit 0.1.5 (``merge_methods/slerp.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import acos, prod, sin, sqrt

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, State, Stream
from shardmerge.ops.parts import CALL_BYTES, weighted_sum, weighted_sum_bytes
from shardmerge.ops.pointwise import infer_floats, number
from shardmerge.ops.shapes import odd_shape

# Elements that are summed at once. Part of the result: float64 addition is not associative.
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Slerp(Arithmetic):
    """From one tensor to the other along the great circle (Shoemake, 1985), as mergekit's ``slerp``.

    The angle is that between the whole tensors as vectors; norms and product are summed in float64. Where the cosine is
    above 0.9995 or below -0.9995 the result is linear. A tensor of norm below 1e-8 counts as one of norm 1.

    Attributes
    ----------
    t
        0 is the first tensor, 1 the second.
    """

    t: float

    @property
    def label(self) -> str:
        """``slerp 0.5``."""
        return f"slerp {self.t}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        if len(inputs) != 2:
            raise odd_shape(f"{self.label}: between how many tensors?", len(inputs), "2 tensors")
        return infer_floats(self.label, inputs)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the bytes of one block of both, widened, and of their products."""
        return _BLOCK * (sum(meta.dtype.itemsize for meta in inputs) + 3 * 8) + CALL_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns the factors of the two tensors; reads both once."""
        first, second = inputs
        squares = [0.0, 0.0, 0.0]
        numel = prod(first.meta.shape)
        wide = np.empty((3, min(numel, _BLOCK)))
        with np.errstate(all="ignore"):
            for start in range(0, numel, _BLOCK):
                count = min(_BLOCK, numel - start)
                block = _products(first.read(start, count), second.read(start, count), wide[:, :count])
                squares = [total + part for total, part in zip(squares, block, strict=True)]
        return _factors(self.t, *squares)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part and its masks."""
        return weighted_sum_bytes(inputs, count)

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` from tiles as long as it."""
        assert isinstance(state, tuple)
        return weighted_sum(state, tiles, out)


def _products(left: Array, right: Array, wide: Array) -> tuple[float, float, float]:
    """Returns the squared norms of two blocks and their scalar product, made in three float64 rows as long as they."""
    x, y, product = wide
    np.copyto(x, left, casting="unsafe")
    np.copyto(y, right, casting="unsafe")
    left_square = float(np.multiply(x, x, out=product).sum())
    right_square = float(np.multiply(y, y, out=product).sum())
    return left_square, right_square, float(np.multiply(x, y, out=product).sum())


# The cosine above which two tensors count as parallel, and the norm below which one has no direction: mergekit's.
_PARALLEL, _NO_NORM = 0.9995, 1e-8


def _factors(t: float, left: float, right: float, product: float) -> tuple[float, float]:
    """Returns what both tensors are multiplied with, from their squared norms and their scalar product."""
    norms = [root if (root := sqrt(square)) > _NO_NORM else 1.0 for square in (left, right)]
    cosine = product / norms[0] / norms[1]
    if not abs(cosine) <= _PARALLEL:  # NaN: one of the tensors has one, and so has the result
        return 1 - t, t
    angle = acos(cosine)
    return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)


KINDS = (
    OpKind(
        name="slerp",
        about="Spherical interpolation between two tensors, linear where they are almost parallel.",
        example='x.weight: {op: slerp, of: ["src:a.weight", "src:b.weight"], t: 0.3}',
        params=(Param("t", "number", "0 is the first tensor, 1 the second."),),
        build=lambda values: Slerp(number(values, "t")),
        many=True,
        lossy="the two tensors are not known",
    ),
)
