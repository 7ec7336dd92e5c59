"""When two arrays count as equal, and how far apart they are where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np

from shardmerge.dtypes import DType, float_dtype
from shardmerge.errors import UsageError
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.casts import CASTABLE
from shardmerge.ops.fast_casts import convert


@dataclass(frozen=True)
class Closeness:
    """What counts as equal: ``|a - b| <= atol + rtol * |b|``, as in numpy and torch.

    NaN equals NaN, 0.0 equals -0.0, and an infinity equals itself only. The difference is computed in float64.

    Parameters
    ----------
    rtol, atol
        Relative and absolute tolerance, finite and not negative. Both 0: the values are the same.
    cast
        Floats of both sides are cast to this type first, so that their types may differ: ``bfloat16``, ``BF16``, or a
        type of the table.
    headers
        Names, types and shapes only; no data is read.

    Raises
    ------
    UsageError
        ``bad-tolerance``; ``unknown-dtype``; ``no-effect``: a tolerance or a cast where no data is compared.
    """

    rtol: float = 0.0
    atol: float = 0.0
    cast: DType | str | None = None
    headers: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not (isfinite(value) and value >= 0):
                raise UsageError("bad-tolerance", f"{name} is {value}", expected="a finite number, 0 or more")
        if isinstance(self.cast, str):
            object.__setattr__(self, "cast", float_dtype(self.cast))
        if self.headers and (self.rtol or self.atol or self.cast):
            what = "a tolerance or a cast is about values, and headers have none"
            raise UsageError("no-effect", what, hint="leave out either `headers` or what is about values")

    @property
    def target(self) -> DType | None:
        """The type of ``cast``."""
        return self.cast if isinstance(self.cast, DType) else None

    def type_of(self, dtype: DType) -> DType:
        """Returns the type in which a tensor is compared."""
        return self.target if self.target is not None and dtype.name in CASTABLE else dtype

    def __str__(self) -> str:
        """Says it for people: ``within rtol 0.001 and atol 0, after a cast to BF16``; ``""`` where it is equality."""
        within = f"within rtol {self.rtol:g} and atol {self.atol:g}" if self.rtol or self.atol else ""
        cast = f"after a cast to {self.target}" if self.target else ""
        headers = "in names, types and shapes" if self.headers else ""
        return ", ".join(text for text in (within, cast, headers) if text)


@dataclass(slots=True)
class Distance:
    """How far two tensors are apart.

    Attributes
    ----------
    elements
        Compared so far.
    differing
        Elements that are not equal.
    beyond
        Those of them that the tolerance does not allow.
    nonfinite
        Those where one side is NaN or infinite and the other is not the same. They are in no maximum.
    max_abs
        The largest finite ``|a - b|``.
    max_rel
        The largest finite ``|a - b| / |b|`` where b is not 0.
    """

    elements: int = 0
    differing: int = 0
    beyond: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    def add(self, a: Array, b: Array, how: Closeness) -> None:
        """Counts a part of the two, of the same length and of any types of the table."""
        self.elements += len(a)
        if a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return
        a, b = _exactly(a), _exactly(b)
        with np.errstate(all="ignore"):
            places = np.flatnonzero(~((a == b) | ((a != a) & (b != b))))  # noqa: PLR0124  # NaN is what differs from itself
            if len(places):
                self._add_differing(a[places], b[places], how)

    def _add_differing(self, a: Array, b: Array, how: Closeness) -> None:
        gaps, size = _gaps(a, b), np.abs(_double(b))
        finite = np.isfinite(gaps)
        within = finite & (gaps <= how.atol + how.rtol * size)
        self.differing += len(a)
        self.beyond += int(np.count_nonzero(~within))
        self.nonfinite += int(np.count_nonzero(~finite))
        self.max_abs = max(self.max_abs, float(gaps.max(where=finite, initial=0.0)))
        nonzero = finite & (size > 0)
        self.max_rel = max(self.max_rel, float((gaps[nonzero] / size[nonzero]).max(initial=0.0)))

    def __str__(self) -> str:
        """Says it for people: ``12 of 6,288 elements (0.191 %), by at most 0.00024 (relative 0.0039)``."""
        share = 100 * self.beyond / self.elements
        odd = f", {self.nonfinite:,} of them NaN or infinite on one side" if self.nonfinite else ""
        most = f", by at most {self.max_abs:g} (relative {self.max_rel:.2g})" if self.beyond > self.nonfinite else ""
        return f"{self.beyond:,} of {self.elements:,} elements ({share:.3g} %){odd}{most}"


def cast(array: Array, source: DType, target: DType) -> Array:
    """Returns floats of one type as those of another, rounded as a conversion rounds them."""
    if source == target:
        return array
    made = np.empty(len(array), numpy_dtype(target))
    convert(array, made, source, target)
    return made


def castable(source: DType, target: DType) -> bool:
    """Tells whether tensors of one type can be cast to another."""
    return source.name in CASTABLE and target.name in CASTABLE


def _exactly(array: Array) -> Array:
    """Returns floats below 8 bytes as float32, and booleans as integers: types that numpy compares and subtracts."""
    if array.dtype.kind in "iuc" or array.dtype == np.float64:
        return array
    return array.astype(np.uint8 if array.dtype == np.bool_ else np.float32)


def _double(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _gaps(a: Array, b: Array) -> Array:
    """Returns ``|a - b|`` in float64; of 64-bit integers exactly before that."""
    if a.dtype == b.dtype and a.dtype.kind in "iu":
        low, high = np.minimum(a, b).astype(np.uint64), np.maximum(a, b).astype(np.uint64)
        return np.subtract(high, low).astype(np.float64)
    gaps: Array = np.abs(_double(a) - _double(b))
    return gaps
