"""Executes one arithmetic op by its contract, with nothing of the engine, and measures what it allocates."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardmerge.dtypes import DTYPES
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.contract import Arithmetic, Meta

# Python's own objects of a call, which no op counts: views, tuples, numbers.
OBJECTS = 4096

_NAMES = {numpy_dtype(row): row for row in DTYPES.values()}


def meta_of(array: Array) -> Meta:
    return Meta(_NAMES[array.dtype], array.shape)


@dataclass
class ArrayStream:
    """An array read as a stream; hands out memory of its own, and remembers how much."""

    array: Array
    largest: int = field(default=0)

    @property
    def meta(self) -> Meta:
        return meta_of(self.array)

    def read(self, start: int, count: int) -> Array:
        assert 0 <= start <= start + count <= self.array.size, "read outside the tensor"
        self.largest = max(self.largest, count)
        return self.array.reshape(-1)[start : start + count].copy()


@dataclass
class Outcome:
    """The result, how many values overflowed, and bytes measured beside bytes promised."""

    array: Array
    overflows: int
    state_peak: int
    state_promised: int
    peak: int
    promised: int


def spans(numel: int, unit: int, tile: int | None) -> Iterator[tuple[int, int]]:
    """Yields (start, count) of tiles of about ``tile`` elements that begin at multiples of the unit."""
    step = numel if tile is None else max(unit, tile // unit * unit)
    for start in range(0, numel, max(step, 1)):
        yield start, min(step, numel - start)


def frozen(array: Array) -> Array:
    array = array.view()
    array.flags.writeable = False
    return array


def execute(op: Arithmetic, arrays: Sequence[Array], tile: int | None = None) -> Outcome:
    """Runs the op; every tile it is given is read-only, and exactly what ``ranges`` asked for."""
    metas = [meta_of(array) for array in arrays]
    meta = op.infer(metas)
    whole = np.empty(meta.shape, numpy_dtype(meta.dtype))
    flat = whole.reshape(-1)
    flat.view(np.uint8).fill(0xAB)  # what is not written shows
    state, state_peak = measured(lambda: op.prepare([ArrayStream(array) for array in arrays]))
    assert state_peak <= op.state_peak(metas) + OBJECTS, f"{op.label}: {state_peak}, {op.state_peak(metas)} promised"
    outcome = Outcome(whole, 0, state_peak, op.state_peak(metas), 0, 0)
    for start, count in spans(flat.size, op.unit(metas), tile):
        asked = op.ranges(metas, start, count)
        assert len(asked) == len(arrays)
        tiles = [frozen(a.reshape(-1)[low : low + n]) for a, (low, n) in zip(arrays, asked, strict=True)]
        assert all(t.size == n for t, (_, n) in zip(tiles, asked, strict=True)), "asked outside the tensor"
        out = flat[start : start + count]
        overflows, peak = measured(lambda: op.apply(state, tiles, start, out))  # noqa: B023
        outcome.overflows += overflows
        if peak >= outcome.peak:
            outcome.peak, outcome.promised = peak, op.peak(metas, count)
        assert peak <= op.peak(metas, count) + OBJECTS, f"{op.label}: {peak}, {op.peak(metas, count)} promised"
    return outcome


def run(op: Arithmetic, arrays: Sequence[Array], tile: int | None = None) -> Array:
    """Returns the result of the op, made in tiles of about ``tile`` elements (whole, if None)."""
    return execute(op, arrays, tile).array


def measured(call):
    """Returns what a call returns, and the most bytes that were allocated at once during it."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        value = call()
        return value, tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()


def same_bits(left: Array, right: Array) -> bool:
    """Tells whether two arrays have the same type, shape and bytes."""
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
