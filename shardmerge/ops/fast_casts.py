"""Fast roads for casts, block by block, with the bits of the exact ones.

A block goes down the fast road first: a SIMD kernel of numkong. Kernels of that library disagree with torch on NaN and
on overflow, so one side of every block is watched, and a block with such a value is made again by the exact road. Which
kernels run depends on the CPU: each is compared with the exact road once a process, on every tie, and not used where it
differs. Nothing here depends on where blocks are cut.

Exact roads: a table for sources of 8 and 16 bits; for float32 to 8 bits a table as well, over its upper 16 bits with
the rest folded into the last one (round to odd); else numpy and ml_dtypes.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Literal, TypeAlias

import numpy as np

from shardmerge.dtypes import DTYPES, DType
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.cast_blocks import BETWEEN, EXACT, INDEX, TABLE, TILE
from shardmerge.ops.rounding import any_from, cast_exactly, count_overflows

# Fills the second array from the first, a value at a time.
CastInto: TypeAlias = Callable[[Array, Array], None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A cast of numkong, and what it must not be trusted with.

    Attributes
    ----------
    source, target
        As numkong calls them.
    watched, first
        Blocks with a magnitude of at least ``first`` (its bits) on the watched side are made by the exact road.
        ``both`` is for float32: what comes in is watched for NaN and large values, what comes out for large negative
        ones, which is one pass and a half where ``in`` takes two.
    between
        Whether bfloat16 is widened to float32 first.
    doubled
        FNUZ types have one exponent more below and one value of zero: twice the value is cast to their sibling, which
        has the same bits but for -0.
    """

    source: str
    target: str
    watched: Literal["in", "out", "both", "neither"]
    first: int = 0
    between: bool = False
    doubled: bool = False

    def fill(self, tile: Array, out: Array) -> None:
        """Fills ``out``, wrong where something is watched for."""
        given, made = tile.ctypes.data, out.ctypes.data  # 2 us each: asked for once
        if not (self.between or self.doubled):
            self._call(given, made, out.size)
            return
        size = min(tile.size, BETWEEN)
        wide, kept = np.empty(size, np.float32), np.empty(size, np.uint8)
        middle = wide.ctypes.data
        for part in _parts(tile.size, BETWEEN):
            count = part.stop - part.start
            self._widen(tile[part], wide[:count])
            self._call(middle, made + part.start, count)
            if self.doubled:
                _without_minus_zero(out[part].view(np.uint8), kept[:count])

    def _widen(self, tile: Array, wide: Array) -> None:
        if self.between:
            np.copyto(wide, tile)
            tile = wide
        if self.doubled:
            with _quietly():
                np.multiply(tile, _TWO, out=wide)

    def _call(self, given: int, made: int, count: int) -> None:
        """Casts from one address to the other; the library takes any alignment."""
        library = numkong()
        assert library is not None
        out = library.from_pointer(made, (count,), self.target)
        library.astype(library.from_pointer(given, (count,), self.source), self.target, out=out)

    def make(self, tile: Array, out: Array) -> bool:
        """Fills ``out`` and tells whether all of it is right; nothing is filled where that is known before.

        What is watched where it comes in is in the cache then: from memory numkong makes 10 GB/s, from a cache 55.
        """
        if self.watched == "in" and any_from(tile, self.first):
            return False
        if self.watched == "both" and not np.maximum.reduce(tile) < _LARGE:  # a maximum is NaN if an element is
            return False
        self.fill(tile, out)
        if self.watched == "both":
            return bool(np.maximum.reduce(_bits(out)) < _NEGATIVE + self.first)
        return self.watched != "out" or not any_from(out, self.first)

    def suspects(self, tile: Array, out: Array) -> Array:
        """Tells for each element whether it is watched for."""
        if self.watched == "both":
            return ~(tile < _LARGE) | (_bits(out) >= _NEGATIVE + self.first)
        if self.watched == "neither":
            return np.zeros(tile.size, np.bool_)
        seen = _bits(tile if self.watched == "in" else out)
        return (seen & ((1 << (8 * seen.itemsize - 1)) - 1)) >= self.first


# The smallest float32 that rounds to an infinite bfloat16, and the sign of that.
_LARGE, _NEGATIVE = np.uint32(0x7F7F8000).view(np.float32), 0x8000


def _bits(values: Array) -> Array:
    return values.view(f"u{values.itemsize}")


_TWO, _MINUS_ZERO = np.float32(2), np.uint8(0x80)


def _without_minus_zero(out: Array, kept: Array) -> None:
    np.not_equal(out, _MINUS_ZERO, out=kept.view(np.bool_))
    np.multiply(out, kept, out=out)


# float32 to bfloat16 is watched for NaN where it comes in, since one of 0x7FFF8000 and more comes out as -0; so is
# float16 to bfloat16. 0x7E is 448 in F8_E4M3, where it saturates. Signalling NaNs of float16 become quiet everywhere.
_KERNELS = {
    ("F32", "F16"): Kernel("float32", "float16", "out", 0x7C00),
    ("F32", "BF16"): Kernel("float32", "bfloat16", "both", 0x7F80),
    ("F32", "F8_E4M3"): Kernel("float32", "e4m3", "out", 0x7E),
    ("F32", "F8_E5M2"): Kernel("float32", "e5m2", "out", 0x7C),
    ("F32", "F8_E4M3FNUZ"): Kernel("float32", "e4m3", "out", 0x7E, doubled=True),
    ("F32", "F8_E5M2FNUZ"): Kernel("float32", "e5m2", "out", 0x7C, doubled=True),
    ("F16", "F32"): Kernel("float16", "float32", "neither"),
    ("F16", "BF16"): Kernel("float16", "bfloat16", "in", 0x7C00),
    ("F16", "F8_E4M3"): Kernel("float16", "e4m3", "out", 0x7E),
    ("F16", "F8_E5M2"): Kernel("float16", "e5m2", "out", 0x7C),
    ("BF16", "F16"): Kernel("bfloat16", "float16", "out", 0x7C00),
    ("BF16", "F8_E4M3"): Kernel("float32", "e4m3", "out", 0x7E, between=True),
    ("BF16", "F8_E5M2"): Kernel("float32", "e5m2", "out", 0x7C, between=True),
    ("BF16", "F8_E4M3FNUZ"): Kernel("float32", "e4m3", "out", 0x7E, between=True, doubled=True),
    ("BF16", "F8_E5M2FNUZ"): Kernel("float32", "e5m2", "out", 0x7C, between=True, doubled=True),
    ("F8_E4M3", "F32"): Kernel("e4m3", "float32", "in", 0x7F),
    ("F8_E4M3", "F16"): Kernel("e4m3", "float16", "in", 0x7F),
    ("F8_E4M3", "BF16"): Kernel("e4m3", "bfloat16", "in", 0x7F),
    ("F8_E5M2", "F32"): Kernel("e5m2", "float32", "in", 0x7C),
    ("F8_E5M2", "F16"): Kernel("e5m2", "float16", "in", 0x7C),
    ("F8_E5M2", "BF16"): Kernel("e5m2", "bfloat16", "in", 0x7C),
}


def convert(tile: Array, out: Array, source: DType, target: DType) -> int:
    """Fills ``out`` from ``tile``, both 1-D; returns how many finite values overflowed."""
    whole = tile.flags.c_contiguous and out.flags.c_contiguous and tile.size == out.size  # kernels see addresses alone
    kernel = _kernel(source, target) if whole else None
    total = 0
    for block in _parts(out.size, TILE):
        given, made = tile[block], out[block]
        if kernel is None or not kernel.make(given, made):
            total += _slowly(given, made, source, target, kernel)
    return total


def _slowly(tile: Array, out: Array, source: DType, target: DType, kernel: Kernel | None) -> int:
    """Makes what no kernel has made, or not rightly."""
    fill, step = exact_road(source, target)
    total = 0
    with _quietly():
        for part in _parts(out.size, step):
            if kernel is None or not kernel.make(tile[part], out[part]):
                fill(tile[part], out[part])
                total += count_overflows(tile[part], out[part], source, target)
    return total


def _quietly() -> AbstractContextManager[None]:
    return np.errstate(over="ignore", invalid="ignore", under="ignore")


def _parts(size: int, step: int) -> Iterator[slice]:
    return (slice(low, min(low + step, size)) for low in range(0, size, step))


# ---- tables


def exact_road(source: DType, target: DType) -> tuple[CastInto, int]:
    """Returns what makes the exact bits, a look-up where a table is small enough, and how many elements at a time."""
    if (source.name, target.name) == ("BF16", "F32"):
        return partial(cast_exactly, source=source, target=target), TILE  # a copy by ml_dtypes, without temporaries
    if source.itemsize <= 2 and target.itemsize << 8 * source.itemsize <= TABLE:
        return _look_up(_table(source, target)), INDEX
    if source.name == "F32" and target.itemsize == 1:
        return _look_up_odd(_table(DTYPES["BF16"], target)), INDEX
    return partial(cast_exactly, source=source, target=target), EXACT


_TABLES: dict[tuple[str, str], Array] = {}
_ONE_AT_A_TIME = threading.Lock()


def _table(source: DType, target: DType) -> Array:
    """Returns the bits of the target for every pattern of the source; made when first asked for."""
    key = (source.name, target.name)
    if key not in _TABLES:
        patterns = np.arange(1 << 8 * source.itemsize, dtype=np.uint32).astype(f"u{source.itemsize}")
        bits = np.empty(patterns.size, f"u{target.itemsize}")
        values, made = patterns.view(numpy_dtype(source)), bits.view(numpy_dtype(target))
        with _quietly():
            for part in _parts(patterns.size, EXACT):
                cast_exactly(values[part], made[part], source, target)
        _TABLES[key] = bits
    return _TABLES[key]


def _look_up(table: Array) -> CastInto:
    def look_up(tile: Array, out: Array) -> None:
        index = tile.view(f"u{tile.itemsize}").astype(np.intp)
        np.take(table, index, out=out.view(table.dtype), mode="clip")  # any mode but "raise" writes without a copy

    return look_up


def _look_up_odd(table: Array) -> CastInto:
    """The upper half of a float32, made odd where the lower is not zero, rounds to 8 bits as the whole does."""

    def look_up(tile: Array, out: Array) -> None:
        bits = tile.view(np.uint32)
        low = np.bitwise_and(bits, 0xFFFF)
        sticky = np.not_equal(low, 0)
        np.right_shift(bits, 16, out=low)
        np.bitwise_or(low, sticky, out=low)
        np.take(table, low.astype(np.intp), out=out.view(table.dtype), mode="clip")

    return look_up


# ---- kernels


@lru_cache(maxsize=1)
def numkong() -> ModuleType | None:
    """Returns the library, or None where it is not installed or lacks casts (before 7.8)."""
    try:
        library = importlib.import_module("numkong")
    except ImportError:
        return None
    return library if hasattr(library, "astype") else None


_TRUSTED: dict[tuple[str, str], bool] = {}


def _kernel(source: DType, target: DType) -> Kernel | None:
    """Returns the fast road, compared with the exact one when it is first asked for."""
    key = (source.name, target.name)
    kernel = _KERNELS.get(key)
    if kernel is None or numkong() is None:
        return None
    if key in _TRUSTED:
        return kernel if _TRUSTED[key] else None
    with _ONE_AT_A_TIME, _quietly():
        if key not in _TRUSTED:
            _TRUSTED[key] = agrees(kernel, source, target)
    return kernel if _TRUSTED[key] else None


def agrees(kernel: Kernel, source: DType, target: DType) -> bool:
    """Tells whether a kernel has the bits of the exact road wherever nothing is watched for.

    Most of it in long runs, some three at a time: kernels have code of their own for the ends of runs.
    """
    fill, _ = exact_road(source, target)
    return all(
        _same(kernel, block, block.size, target, fill) and _same(kernel, block[::1021].copy(), 3, target, fill)
        for block in every_tie(source)
    )


def every_tie(source: DType) -> Iterator[Array]:
    """Yields all patterns of 8 and 16 bits; of float32 all upper halves, then those that matter with lower ones around
    each tie: exponents from what 16 and 8 bits round to nothing up to what they cannot hold.
    """
    if source.itemsize < 4:
        patterns = np.arange(1 << 8 * source.itemsize, dtype=np.uint32).astype(f"u{source.itemsize}")
        yield from (patterns[part].view(numpy_dtype(source)) for part in _parts(patterns.size, EXACT))
        return
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    yield from (halves[part].view(np.float32) for part in _parts(halves.size, EXACT))
    usual = halves[100 << 7 : 145 << 7]  # 2**-27 and more, less than 2**18
    for low in (1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        for sign in (0, 1 << 31):
            yield (usual | np.uint32(low | sign)).view(np.float32)


def _same(kernel: Kernel, values: Array, step: int, target: DType, fill: CastInto) -> bool:
    made, expected = np.empty((2, values.size), f"u{target.itemsize}")
    fill(values, expected.view(numpy_dtype(target)))
    for part in _parts(values.size, step):
        kernel.fill(values[part], made[part])
    return bool(((made == expected) | kernel.suspects(values, made)).all())
