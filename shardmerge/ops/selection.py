"""The k-th largest magnitude of a tensor that is only streamed: exact, by two histograms of bit patterns.

The bits of a non-negative float32 order like an unsigned integer (IEEE 754), infinity and NaN above all numbers. The
first pass counts the upper 16 bits, the second the lower 16 of those in the bin that holds the k-th largest, and a
third looks for the last element that is kept among its equals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
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


def ordered_keys(values: Array) -> Array:
    """Returns float32 numbers as uint32 that order like them, negative ones included; in new memory."""
    bits: Array = values.view(np.uint32)
    # All bits of a negative number are turned, of others the sign alone.
    made: Array = bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31))
    return made


def value_of(key: int) -> float:
    """Returns the number that ``ordered_keys`` made a key of."""
    bits = key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def select_peak(tensors: int) -> int:
    """Returns the bytes that ``select`` allocates for so many tensors, those of ``stream`` not included."""
    return 8 * _BINS * (tensors + 4) + PART * (8 + 8 + 8 + 8)


# Nothing is above the largest key.
_NOTHING = Kept((1 << 32) - 1, 0)


def kept(stream: KeyBlocks, counts: Sequence[int], numel: int) -> tuple[Kept | None, ...]:
    """Returns what ``select`` does, for any count: None for a tensor of which everything is kept."""
    asked = [index for index, count in enumerate(counts) if 0 < count < numel]

    def some(wanted: Collection[int]) -> Iterator[tuple[int, int, Array]]:
        places = {asked[place]: place for place in wanted}
        return ((start, places[index], block) for start, index, block in stream(tuple(places)))

    found = dict(zip(asked, select(some, [counts[index] for index in asked], numel), strict=True)) if asked else {}
    return tuple(None if count >= numel else found.get(index, _NOTHING) for index, count in enumerate(counts))


def select(stream: KeyBlocks, counts: Sequence[int], numel: int) -> tuple[Kept, ...]:
    """Returns how the largest elements of each tensor are told from the others.

    Parameters
    ----------
    stream
        Yields the keys of the tensors asked for, in blocks of at most ``PART``, indices ascending; called up to three
        times. Done with before the next is asked for.
    counts
        How many of each tensor, from 1 to ``numel``. Among equal magnitudes those with the lowest index are kept.
    """
    everything = range(len(counts))
    found = thresholds(stream, counts, numel)
    pending = {index: found[index].missing for index in everything if found[index].missing < found[index].equals}
    stops = _stops(stream, [one.key for one in found], pending)
    return tuple(Kept(found[index].key, stops.get(index, numel)) for index in everything)


@dataclass(frozen=True, slots=True)
class Threshold:
    """The key of the n-th largest element; so many have it, and ``missing`` of them are among the n largest."""

    key: int
    equals: int
    missing: int


def thresholds(stream: KeyBlocks, counts: Sequence[int], numel: int) -> list[Threshold]:
    """Returns the ``counts``-th largest key of each tensor; ``stream`` is called twice."""
    tensors, everything = len(counts), range(len(counts))
    halves = np.empty(min(numel, PART), np.intp)
    upper = np.zeros((tensors, _BINS), np.int64)
    for _, index, block in stream(everything):
        np.add.at(upper[index], _upper_halves(block, halves), 1)  # without the new histogram that `bincount` makes
    tops = [_bin(upper[index], counts[index]) for index in everything]
    del upper
    lower = np.zeros((tensors, _BINS), np.int64)
    for _, index, block in stream(everything):
        near = block[_upper_halves(block, halves) == tops[index][0]]
        np.add.at(lower[index], (near & (_BINS - 1)).astype(np.intp), 1)
    found = []
    for index, (top, wanted) in enumerate(tops):
        low, missing = _bin(lower[index], wanted)
        found.append(Threshold(top << 16 | low, int(lower[index, low]), missing))
    return found


def _upper_halves(block: Array, out: Array) -> Array:
    return np.right_shift(block, 16, out=out[: len(block)], casting="unsafe")


def _bin(histogram: Array, count: int) -> tuple[int, int]:
    """Returns the bin of the ``count``-th largest, and how many of it are among those."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, count))
    found = len(histogram) - 1 - place
    return found, count - int(above[place] - histogram[found])


def _stops(stream: KeyBlocks, keys: list[int], pending: dict[int, int]) -> dict[int, int]:
    """Returns behind which index no more equals are kept, for the tensors that have too many of them."""
    stops: dict[int, int] = {}
    if not pending:
        return stops
    left = dict(pending)
    for start, index, block in stream(tuple(pending)):
        if index in stops:
            continue
        equal = block == keys[index]
        found = int(np.count_nonzero(equal))
        if found >= left[index]:
            stops[index] = start + int(np.flatnonzero(equal)[left[index] - 1]) + 1
            if len(stops) == len(pending):
                break
        left[index] -= found
    return stops
