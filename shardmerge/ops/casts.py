"""Casts between float types: ties to even, NaN and infinities kept, overflow counted.

Bits are those of torch 2.13, F8_E4M3 included, which saturates at 448 since it has no infinity. One exception: float64
is rounded once, where torch passes through float32 and rounds twice.

This module says what the bits are; ``fast_casts`` makes them at the speed that ``docs/benchmarks.md`` shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.dtypes import DTYPES, DType, float_dtype
from shardmerge.ops import fast_casts
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, State, Value

# Types whose every value float32 holds exactly: a cast from them may pass through float32 and still rounds once.
_EXACT_IN_F32 = frozenset({"F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True, slots=True)
class Cast(Arithmetic):
    """A cast from one float type to another.

    Attributes
    ----------
    source, target
        Different float types of the table.
    """

    source: DType
    target: DType

    @property
    def label(self) -> str:
        """``cast F32 to BF16``."""
        return f"cast {self.source} to {self.target}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the same shape in the target type."""
        return Meta(self.target, inputs[0].shape)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of temporaries: those of a few blocks, whatever the count."""
        return fast_casts.PEAK

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` (dtype ``target``) from the one tile (dtype ``source``); returns the overflow count."""
        (tile,) = tiles
        return fast_casts.convert(tile, out, self.source, self.target, self._exact, self._overflows)

    def _exact(self, tile: Array, out: Array) -> None:
        """The cast as it is defined; whatever is faster has these bits."""
        near = tile if self._direct else self._through_f32(tile)
        if self.target.name == "F8_E4M3":
            near = np.clip(near, -_E4M3_MAX, _E4M3_MAX)
        np.copyto(out, near, casting="unsafe")
        if (self.source.name, self.target.name) == ("F16", "F32"):
            _quiet(out)

    def _overflows(self, tile: Array, out: Array) -> int:
        if exact(self) or not _any_special(out, self.target):
            return 0
        if self.target.name == "F8_E4M3":  # infinities count as well, since none is kept
            wide = tile if self._direct else self._through_f32(tile)
            return int(np.count_nonzero(np.abs(wide) > _E4M3_TIE))
        return _overflows(tile, out, self.target)

    @property
    def _direct(self) -> bool:
        """Whether one library cast rounds once: from or to float32, or float64 by numpy's own types."""
        return "F32" in (self.source.name, self.target.name) or {self.source.name, self.target.name} == {
            "F64",
            "F16",
        }

    def _through_f32(self, tile: Array) -> Array:
        if self.source.name in _EXACT_IN_F32:
            return tile.astype(np.float32)
        return _round_to_odd(tile)


@dataclass(frozen=True, slots=True)
class Widen(Cast):
    """An exact cast that nobody asked for: it lets tensors of different types lie side by side."""


def _round_to_odd(tile: Array) -> Array:
    """Narrows float64 to float32 so that a second rounding, to fewer bits, still gives the nearest-even result.

    A value float32 cannot hold gets an odd last bit, which no shorter type takes for a tie (Boldo and Melquiond,
    "When double rounding is odd", 2005).
    """
    near = tile.astype(np.float32)
    bits = near.view(np.int32)
    wide = near.astype(np.float64)
    inexact = (wide != tile) & np.isfinite(near) & ((bits & 1) == 0)
    # Even and inexact: step one unit towards the true value, which is the odd neighbour on its side.
    away = np.where(np.abs(wide) < np.abs(tile), 1, -1).astype(np.int32)
    np.add(bits, away, out=bits, where=inexact)
    return near


def _quiet(out: Array) -> None:
    """Sets the quiet bit of every NaN, as torch and the F16C instructions do and numpy does not."""
    bits = out.view(np.uint32)
    np.bitwise_or(bits, 0x00400000, out=bits, where=np.isnan(out))


# The largest value of F8_E4M3, and the tie above it, which still rounds to it.
_E4M3_MAX, _E4M3_TIE = 448.0, 464.0


def _overflows(tile: Array, out: Array, target: DType) -> int:
    finite_before = np.isfinite(tile.astype(np.float64 if tile.dtype.itemsize == 8 else np.float32, copy=False))
    finite_after = np.isfinite(out.astype(np.float32, copy=False)) if target.itemsize < 4 else np.isfinite(out)
    return int(np.count_nonzero(finite_before & ~finite_after))


def _any_special(out: Array, target: DType) -> bool:
    """Tells whether any element is infinite or NaN, without a test per element where the bits tell."""
    first = _FIRST_SPECIAL.get(target.name)
    if not out.size:
        return False
    if target.name in _ONE_NAN:
        return bool((out.view(np.uint8) == 0x80).any())
    return True if first is None else fast_casts.any_from(out, first)


# The smallest bit pattern, sign clear, that is infinite or NaN; of F8_E4M3 the value that it saturates at.
_FIRST_SPECIAL = {
    "F32": 0x7F800000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E4M3": 0x7E,
    "F8_E5M2": 0x7C,
}
# Types without infinities, whose one NaN has the pattern of -0.
_ONE_NAN = frozenset({"F8_E4M3FNUZ", "F8_E5M2FNUZ"})

# Whose every value the other holds exactly: sign, exponent range (subnormals included) and mantissa.
_EXACT_IN = {
    "F64": frozenset({"F32", *_EXACT_IN_F32}),
    "F32": _EXACT_IN_F32,
    "F16": frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}),
    "BF16": frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}),
}


def exact(cast: Cast) -> bool:
    """Tells whether a cast changes no value, so that a later one may skip it."""
    return cast.source.name in _EXACT_IN.get(cast.target.name, ())


CASTABLE = frozenset(row.name for row in DTYPES.values() if row.kind == "float" and row.name != "F8_E8M0")


def _build(values: Mapping[str, Value]) -> Cast:
    """The source type is not known yet: ``compose`` takes it from the input."""
    return Cast(DTYPES["F32"], float_dtype(str(values["dtype"])))


KINDS = (
    OpKind(
        name="cast",
        about="Casts a float tensor, whatever `output.dtype` says of the rest. Ties go to the even neighbour; integers "
        "and booleans stay what they are.",
        example='"{name}.norm.weight": {op: cast, of: "src:{name}.norm.weight", dtype: float32}',
        params=(Param("dtype", "dtype", "`float32`, `bfloat16`, `float16`, ..."),),
        build=_build,
        lossy="a cast to a narrower type forgets bits",
    ),
)
