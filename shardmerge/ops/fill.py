"""Tensors made of nothing: constants and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.dtypes import DTYPES, DType, float_dtype
from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, ParamValue, Shape, State, Typed
from shardmerge.ops.params import integers
from shardmerge.ops.pointwise import number


@dataclass(frozen=True, slots=True)
class Fill(Arithmetic):
    """One value everywhere.

    Attributes
    ----------
    dtype
        A float type.
    value
        Rounded to it once; not larger than it can hold.
    """

    shape: Shape
    dtype: DType
    value: float

    @property
    def label(self) -> str:
        """``fill [1, 577, 1024] F32 0.0``."""
        return f"fill {list(self.shape)} {self.dtype} {self.value!r}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``filled with 0.0``."""
        del inputs
        return f"filled with {self.value!r}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the parameters' own type and shape."""
        del inputs
        return Meta(self.dtype, self.shape)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of one number."""
        del inputs, count
        return 1 << 10

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Writes the value."""
        del state, tiles, start
        out[...] = rounded(self.value, self.dtype)
        return 0


@dataclass(frozen=True, slots=True)
class Arange(Arithmetic):
    """``torch.arange(numel).reshape(shape)`` in int64, such as the ``position_ids`` of a CLIP ``[1, positions]``."""

    shape: Shape

    @property
    def label(self) -> str:
        """``arange [1, 577]``."""
        return f"arange {list(self.shape)}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``counted from 0``."""
        del inputs
        return "counted from 0"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns I64 and the shape."""
        del inputs
        return Meta(DTYPES["I64"], self.shape)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of the numbers before they are copied."""
        del inputs
        return 8 * count + (1 << 10)

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Writes the row-major index of every element."""
        del state, tiles
        np.copyto(out, np.arange(start, start + len(out), dtype=np.int64))
        return 0


def rounded(value: float, dtype: DType) -> Array:
    """Returns a number in a type, 0-d."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(value, np.float64).astype(numpy_dtype(dtype))


def _shape(values: Mapping[str, ParamValue]) -> Shape:
    shape = integers(values, "shape")
    if min(shape, default=0) < 0:
        raise MappingError("op-value", f"`shape` is {list(shape)}", expected="a list of sizes, none negative")
    return shape


def _fill(values: Mapping[str, ParamValue]) -> Fill:
    made = Fill(_shape(values), float_dtype(str(values["dtype"])), number(values, "value"))
    if not np.isfinite(rounded(made.value, made.dtype)):
        raise MappingError("op-value", f"`value: {made.value}` is too large for {made.dtype}")
    return made


KINDS = (
    OpKind(
        name="fill",
        about="Creates a tensor with the same value everywhere, for a weight that a target needs and no source has.",
        example="image_newline: {op: fill, shape: [1024], value: 0}",
        params=(
            Param("shape", "ints", "Its shape."),
            Param("dtype", "dtype", "`float32`, `bfloat16`, `float16`, ...", "float32"),
            Param("value", "number", "The value.", 0),
        ),
        build=_fill,
        lossy="it is made of nothing",
        takes_of=False,
    ),
    OpKind(
        name="arange",
        about="Creates the numbers 0, 1, 2, ... in int64, row-major, for buffers such as `position_ids`.",
        example="embeddings.position_ids: {op: arange, shape: [1, 577]}",
        params=(Param("shape", "ints", "Its shape."),),
        build=lambda values: Arange(_shape(values)),
        lossy="it is made of nothing",
        takes_of=False,
    ),
)
