"""LyCORIS: products by elements (LoHa) and of Kronecker (LoKr), added to a weight.

Formulas as in lycoris-lora 4.1 (``functional/loha.py``, ``functional/lokr.py``) and peft 0.21 (``tuners/loha``,
``tuners/lokr``). A convolution is a matrix over flattened kernels: the planner makes it. All in float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import PRODUCT_BYTES, one_thread
from shardmerge.ops.contract import Arithmetic, Meta, State, Stream, Typed, result_dtype
from shardmerge.ops.low_rank import narrow

# Rows that are made together: part of the bits.
_ROWS = 32
# What numpy takes for a call on a part of rows, and views.
_OVERHEAD = 8192 * 8 * 2 + 8192


@dataclass(frozen=True, slots=True)
class ScaleBy(Arithmetic):
    """A tensor times a number that stands in another one: the ``.alpha`` beside kohya's factors.

    Inputs: the tensor, and one element of any shape.
    """

    multiplies: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """``times its alpha``."""
        return "times its alpha"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape as it is."""
        one, factor = inputs
        if factor.shape not in ((), (1,)) or one.dtype.kind != "float":
            raise MappingError("op-shape", f"{self.label}: alpha is no number", found=str(list(factor.shape)))
        return Meta(result_dtype((one,)), one.shape)

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The same elements; the number is in the state."""
        return ((start, count), (0, 0))

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """A number."""
        return _OVERHEAD

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns the number."""
        return float(inputs[1].read(0, 1)[0])

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """A part in float64, and a mask."""
        return 10 * count + _OVERHEAD

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills any range."""
        assert isinstance(state, float)
        with np.errstate(all="ignore"):
            wide = tiles[0].astype(np.float64)
            wide *= state
            return narrow(wide, out, tiles[0])


@dataclass(frozen=True, slots=True)
class _OntoRows(Arithmetic):
    """``base + scale * product`` by whole rows; the base is the last input."""

    like: ClassVar[int] = -1
    multiplies: ClassVar[bool] = True

    scale: float

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the base's shape."""
        base = inputs[-1]
        odd = [meta.dtype.name for meta in inputs if meta.dtype.kind != "float" or len(meta.shape) != 2]
        if odd or self.product_shape(inputs[:-1]) != base.shape:
            raise MappingError(
                "op-shape",
                f"{self.label}: the factors and the base do not fit",
                found=", ".join(str(list(meta.shape)) for meta in inputs[:-1]) + f", base {list(base.shape)}",
                hint="name the base that the adapter was trained on",
            )
        return Meta(result_dtype(inputs), base.shape)

    def product_shape(self, factors: Sequence[Meta]) -> tuple[int, int] | None:
        """Returns the shape of the product, None where the factors do not fit each other."""
        raise NotImplementedError

    def unit(self, inputs: Sequence[Meta]) -> int:
        """A block of whole rows."""
        return max(1, _ROWS * inputs[-1].shape[1])

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Three blocks in float64 and masks; factors of all rows."""
        base = inputs[-1]
        factors = sum(meta.shape[1] for meta in inputs[:-1])
        return (
            _ROWS * base.shape[1] * (3 * 8 + 3)
            + 8 * factors * (count // max(base.shape[1], 1) + 1)
            + _OVERHEAD
            + PRODUCT_BYTES
        )

    def onto(self, base: Array, out: Array, rows: slice, product: Array) -> int:
        """Adds a block's product, which is written over; returns how many overflowed."""
        product *= self.scale
        product += base[rows]
        return narrow(product, out[rows], base[rows])


@dataclass(frozen=True, slots=True)
class LoHa(_OntoRows):
    """``base + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``, the second product by elements.

    Inputs: w1_a ``[out, r]``, w1_b ``[r, in]``, w2_a, w2_b, base ``[out, in]``.
    """

    @property
    def label(self) -> str:
        """``loha x 0.5``."""
        return f"loha x {self.scale:g}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``LoHa merged``."""
        del inputs
        return "LoHa merged"

    def product_shape(self, factors: Sequence[Meta]) -> tuple[int, int] | None:
        """``[out, in]`` of both products."""
        w1_a, w1_b, w2_a, w2_b = (meta.shape for meta in factors)
        fits = w1_a[1] == w1_b[0] and w2_a[1] == w2_b[0] and (w1_a[0], w1_b[1]) == (w2_a[0], w2_b[1])
        return (w1_a[0], w1_b[1]) if fits else None

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The rows of all but the right factors, which are in the state."""
        width = inputs[-1].shape[1]
        row, rows = (start // width, count // width) if width else (0, 0)
        first, second = inputs[0].shape[1], inputs[2].shape[1]
        return ((row * first, rows * first), (0, 0), (row * second, rows * second), (0, 0), (start, count))

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """The right factors in float64, and as stored while they are read."""
        return (
            sum((8 + inputs[at].dtype.itemsize) * inputs[at].shape[0] * inputs[at].shape[1] for at in (1, 3))
            + _OVERHEAD
        )

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns the right factors."""
        return tuple(_whole(inputs[at]) for at in (1, 3))

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows."""
        assert isinstance(state, tuple)
        right1, right2 = state
        base, result = tiles[-1].reshape(-1, right1.shape[1]), out.reshape(-1, right1.shape[1])
        lost = 0
        with np.errstate(all="ignore"), one_thread():
            left1 = tiles[0].astype(np.float64).reshape(-1, len(right1))
            left2 = tiles[2].astype(np.float64).reshape(-1, len(right2))
            for top in range(0, len(base), _ROWS):
                rows = slice(top, min(top + _ROWS, len(base)))
                product = left1[rows] @ right1
                product *= left2[rows] @ right2
                lost += self.onto(base, result, rows, product)
        return lost


@dataclass(frozen=True, slots=True)
class LoKr(_OntoRows):
    """``base + scale * kron(w1, w2)``. Inputs: w1 ``[a, b]``, w2 ``[c, d]``, base ``[a * c, b * d]``."""

    @property
    def label(self) -> str:
        """``lokr x 0.5``."""
        return f"lokr x {self.scale:g}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``LoKr merged``."""
        del inputs
        return "LoKr merged"

    def product_shape(self, factors: Sequence[Meta]) -> tuple[int, int] | None:
        """``[a * c, b * d]``."""
        first, second = (meta.shape for meta in factors)
        return first[0] * second[0], first[1] * second[1]

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The rows of the base; the factors are in the state."""
        return (0, 0), (0, 0), (start, count)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """The factors in float64, and as stored while they are read."""
        sizes = [(8 + meta.dtype.itemsize) * meta.shape[0] * meta.shape[1] for meta in inputs[:2]]
        return sum(sizes) + _OVERHEAD

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns the factors."""
        return tuple(_whole(one) for one in inputs[:2])

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows."""
        assert isinstance(state, tuple)
        first, second = state
        width = first.shape[1] * second.shape[1]
        base, result = tiles[-1].reshape(-1, width), out.reshape(-1, width)
        top, lost = start // width if width else 0, 0
        with np.errstate(all="ignore"):
            for low in range(0, len(base), _ROWS):
                rows = slice(low, min(low + _ROWS, len(base)))
                numbers = np.arange(top + rows.start, top + rows.stop)
                left, right = first[numbers // len(second)], second[numbers % len(second)]
                product = (left[:, :, None] * right[:, None, :]).reshape(len(left), width)
                lost += self.onto(base, result, rows, product)
        return lost


def _whole(stream: Stream) -> Array:
    rows, columns = stream.meta.shape
    return stream.read(0, rows * columns).reshape(rows, columns).astype(np.float64)
