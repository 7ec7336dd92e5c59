"""What the bits of a cast are: ties to even, NaN and infinities kept, overflow counted.

They are those of torch 2.13, F8_E4M3 included, which saturates at 448 since it has no infinity. One exception: float64
is rounded once, where torch passes through float32 and rounds twice.
"""

from __future__ import annotations

import numpy as np

from shardmerge.dtypes import DType
from shardmerge.ops.arrays import Array
from shardmerge.ops.holding import EXACT_IN_F32, holds


def cast_exactly(tile: Array, out: Array, source: DType, target: DType) -> None:
    """Fills ``out`` from ``tile``: the cast as it is defined; whatever is faster has these bits.

    Temporaries take at most 40 bytes an element.
    """
    near = tile if _direct(source, target) else _through_f32(tile, source)
    if target.name == "F8_E4M3":
        near = np.clip(near, -_E4M3_MAX, _E4M3_MAX)
    np.copyto(out, near, casting="unsafe")
    if (source.name, target.name) == ("F16", "F32"):
        _quiet(out)


def count_overflows(tile: Array, out: Array, source: DType, target: DType) -> int:
    """Returns how many finite values of ``tile`` are none in ``out``; temporaries as above."""
    if holds(target, source) or not _any_special(out, target):
        return 0
    if target.name == "F8_E4M3":  # infinities count as well, since none is kept
        wide = tile if _direct(source, target) else _through_f32(tile, source)
        return int(np.count_nonzero(np.abs(wide) > _E4M3_TIE))
    return _overflows(tile, out, target)


def _direct(source: DType, target: DType) -> bool:
    """Whether one library cast rounds once: from or to float32, or float64 by numpy's own types."""
    return "F32" in (source.name, target.name) or {source.name, target.name} == {"F64", "F16"}


def _through_f32(tile: Array, source: DType) -> Array:
    if source.name in EXACT_IN_F32:
        return tile.astype(np.float32)
    return _round_to_odd(tile)


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
    return True if first is None else any_from(out, first)


def any_from(seen: Array, first: int) -> bool:
    """Tells whether any element's bits, sign clear, are at least ``first``."""
    size = seen.itemsize
    top = 1 << (8 * size - 1)
    signed, unsigned = seen.view(f"i{size}"), seen.view(f"u{size}")
    return bool(np.maximum.reduce(signed) >= first or np.maximum.reduce(unsigned) >= first + top)


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
