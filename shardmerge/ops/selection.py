"""The k-th largest magnitude of a tensor that is only streamed: exact, by two histograms of bit patterns.

The bits of a non-negative float32 order like an unsigned integer (IEEE 754), infinity and NaN above all numbers. The
first pass counts the upper 16 bits, the second the lower 16 of those in the bin that holds the k-th largest, and a
third looks for the last element that is kept among its equals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.parts import PART

_BINS = 1 << 16

# First index, number of the tensor, and keys of its block.
KeyBlocks: TypeAlias = Callable[[Collection[int]], Iterator[tuple[int, int, Array]]]


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a tensor: all above a threshold, and its equals up to an index.

    Attributes
    ----------
    threshold
        A key.
    stop
        Elements of just this key are kept below this row-major index.
    """

    threshold: int
    stop: int

    def mask(self, block: Array, start: int) -> Array:
        """Returns which elements are kept, for the keys of elements ``[start, start + len(block))``."""
        mask = np.empty(len(block), np.bool_)
        equal = max(min(self.stop - start, len(block)), 0)
        np.greater_equal(block[:equal], self.threshold, out=mask[:equal])
        np.greater(block[equal:], self.threshold, out=mask[equal:])
        return mask


def keys(values: Array, out: Array | None = None) -> Array:
    """Returns the bits of the magnitudes in float32, uint32, in memory of ``out``, float32, where it is given.

    What float32 cannot hold is infinite.
    """
    narrow = np.empty(values.shape, np.float32) if out is None else out
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.abs(values, out=narrow, casting="unsafe")
    return narrow.view(np.uint32)


def select_peak(tensors: int) -> int:
    """Returns the bytes that ``select`` allocates for so many tensors, those of ``stream`` not included."""
    return 8 * _BINS * (tensors + 4) + PART * (8 + 8 + 8 + 8)


def select(stream: KeyBlocks, tensors: int, count: int, numel: int) -> tuple[Kept, ...]:
    """Returns how the ``count`` largest elements of each tensor are told from the others.

    Parameters
    ----------
    stream
        Yields the keys of the tensors asked for, in blocks of at most ``PART``, indices ascending; called up to three
        times. Done with before the next is asked for.
    count
        From 1 to ``numel``. Among equal magnitudes those with the lowest index are kept.
    """
    everything = range(tensors)
    halves = np.empty(min(numel, PART), np.intp)
    upper = np.zeros((tensors, _BINS), np.int64)
    for _, index, block in stream(everything):
        np.add.at(upper[index], _upper_halves(block, halves), 1)  # without the new histogram that `bincount` makes
    tops = [_bin(upper[index], count) for index in everything]
    del upper
    lower = np.zeros((tensors, _BINS), np.int64)
    for _, index, block in stream(everything):
        near = block[_upper_halves(block, halves) == tops[index][0]]
        np.add.at(lower[index], (near & (_BINS - 1)).astype(np.intp), 1)
    thresholds, pending = [], {}
    for index, (top, wanted) in enumerate(tops):
        low, missing = _bin(lower[index], wanted)
        thresholds.append(top << 16 | low)
        if missing < lower[index, low]:
            pending[index] = missing
    stops = _stops(stream, thresholds, pending)
    return tuple(Kept(threshold, stops.get(index, numel)) for index, threshold in enumerate(thresholds))


def _upper_halves(block: Array, out: Array) -> Array:
    return np.right_shift(block, 16, out=out[: len(block)], casting="unsafe")


def _bin(histogram: Array, count: int) -> tuple[int, int]:
    """Returns the bin of the ``count``-th largest, and how many of it are among those."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, count))
    found = len(histogram) - 1 - place
    return found, count - int(above[place] - histogram[found])


def _stops(stream: KeyBlocks, thresholds: list[int], pending: dict[int, int]) -> dict[int, int]:
    """Returns behind which index no more equals are kept, for the tensors that have too many of them."""
    stops: dict[int, int] = {}
    if not pending:
        return stops
    left = dict(pending)
    for start, index, block in stream(tuple(pending)):
        if index in stops:
            continue
        equal = block == thresholds[index]
        found = int(np.count_nonzero(equal))
        if found >= left[index]:
            stops[index] = start + int(np.flatnonzero(equal)[left[index] - 1]) + 1
            if len(stops) == len(pending):
                break
        left[index] -= found
    return stops
