"""A number that tells where all elements of a tensor come from: equal for equal moves, however they are said. Pure.

An element at place ``k`` of the tensor that is byte ``a`` of the file ``f`` counts ``mark(f) * S**a * R**k``, modulo a
prime, and a tensor is the sum of its elements. So it does not matter in which parts, or in which order, the moves say
where they are; and a nest of loops is a product of geometric series, so that no element is counted by itself.

Different tensors are different polynomials in S and R, of a degree below 2**64. At a point that has nothing to do with
them they have the same value with a probability of 2**-450 (the lemma of Schwartz and Zippel).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache

from shardmerge.ops.contract import Op
from shardmerge.ops.written import op_row
from shardmerge.plan.places import PlacedElements, Shares, places
from shardmerge.plan.walks import Loop
from shardmerge.tensors import Made, TensorEntry, View
from shardmerge.tensors.ranges import FlatRanges
from shardmerge.tensors.ranks import Fragments, Partitions, RankChunks, chunk_numel

PRIME = (1 << 521) - 1

# Bits of an exponent that are looked up at a time.
_BITS = 5


class Marks:
    """Gives the numbers of tensors.

    Parameters
    ----------
    file
        Returns what tells a file from all others, of its path.
    """

    def __init__(self, file: Callable[[str], str]) -> None:
        self._file = file
        self._files: dict[tuple[str, str], int] = {}
        self._tables: dict[tuple[int, str], tuple[Partitions, list[int]]] = {}  # by identity; so they are kept alive

    def of(self, entry: TensorEntry) -> int:
        """Returns the number of a tensor; 0 for one without elements."""
        return sum(map(self._of, places(entry))) % PRIME if entry.numel else 0

    def _of(self, one: PlacedElements) -> int:
        if isinstance(one, Shares):
            found = (
                self._ranges(one.of, one.casts) if isinstance(one.of, FlatRanges) else self._shares(one.of, one.casts)
            )
            return found * _R(one.at) % PRIME
        walk = one.walk
        total = self._name(one.of, one.casts) * _S(walk.index[0]) * _R(walk.at) % PRIME
        for loop in walk.loops:
            total = total * _series(loop) % PRIME
        return total

    def _ranges(self, ranges: FlatRanges, casts: str) -> int:
        """The sum over all ranges by Horner's rule: three products each, where pieces would be 20 microseconds."""
        files = [self._name(file, casts) for file in ranges.files]
        offsets = {offset: _S(offset) for offset in set(ranges.offsets)}  # ranks mostly have one layout
        total = 0
        for at in reversed(range(len(ranges))):
            count = ranges.starts[at + 1] - ranges.starts[at]
            begin = files[ranges.which[at]] * offsets[ranges.offsets[at]] % PRIME
            total = (total * _step(count) + begin * _run(count, ranges.itemsize)) % PRIME
        return total

    def _shares(self, chunks: RankChunks, casts: str) -> int:
        """The sum over all ranks: a share of each begins where its flat tensor does, and some elements behind that."""
        share = chunk_numel(chunks.numel, len(chunks.partitions))
        begins, (full, rest) = self._begins(chunks.partitions, casts), divmod(chunks.numel, share)
        total, step = 0, _R(share)
        for begin in reversed(begins[:full]):
            total = (total * step + begin) % PRIME
        total *= _run(share, chunks.itemsize)
        if rest:
            total += begins[full] * _R(full * share) * _run(rest, chunks.itemsize)
        return total * _S(chunks.start * chunks.itemsize) % PRIME

    def _begins(self, table: Partitions, casts: str) -> list[int]:
        """Returns by rank what the first element of its flat tensor counts at place 0. All of a group share a table."""
        if not isinstance(table, Fragments) and (id(table), casts) in self._tables:
            return self._tables[id(table), casts][1]
        extents = [table[rank].extent for rank in range(len(table))]
        offsets = {offset: _S(offset) for offset in {one.offset for one in extents}}  # ranks mostly have one layout
        found = [self._name(one.file, casts) * offsets[one.offset] % PRIME for one in extents]
        if not isinstance(table, Fragments):  # whose numbers are of one parameter only
            self._tables[id(table), casts] = table, found
        return found

    def _name(self, of: str | Made | View, casts: str) -> int:
        """The number of a file, or of what is computed: by its op, its parameters, and what it is computed from."""
        if isinstance(of, str):
            if (of, casts) not in self._files:
                self._files[of, casts] = _mark(f"{casts}{self._file(of)}")
            return self._files[of, casts]
        bases = [[base.dtype.name, base.shape, f"{self.of(base):x}"] for base in of.bases]
        assert isinstance(of.recipe, Op)
        how = [of.offset, of.shape, of.strides] if isinstance(of, View) else op_row(of.recipe)
        return _mark(f"{casts}{json.dumps([how, bases], sort_keys=True)}")


def _mark(text: str) -> int:
    return int.from_bytes(hashlib.sha512(text.encode()).digest(), "big")


class _Powers:
    """Powers of one number: of each digit of the exponent looked up, since ``pow`` takes twenty times as long."""

    def __init__(self, base: int) -> None:
        self._next = base  # to the power of the lowest digit that is not there yet
        self._digits: list[list[int]] = []

    def __call__(self, exponent: int) -> int:
        result, digit = 1, 0
        while exponent:
            if digit == len(self._digits):
                self._grow()
            low = exponent & ((1 << _BITS) - 1)
            if low:
                result = result * self._digits[digit][low] % PRIME
            exponent >>= _BITS
            digit += 1
        return result

    def _grow(self) -> None:
        powers = [1]
        for _ in range(1 << _BITS):
            powers.append(powers[-1] * self._next % PRIME)
        self._digits.append(powers)
        self._next = powers.pop()


# Any numbers do that were not chosen with the formula in mind.
_S, _R = _Powers(_mark("shardmerge: bytes of a file")), _Powers(_mark("shardmerge: places of a tensor"))


@lru_cache(maxsize=1 << 12)
def _step(count: int) -> int:
    """Returns what so many elements further on in the result multiply by."""
    return _R(count)


@lru_cache(maxsize=1 << 12)
def _run(count: int, size: int) -> int:
    """Returns the sum over elements of ``size`` bytes one behind the other, the first of them counted as 1."""
    return _series((count, 1, (size,)))


@lru_cache(maxsize=1 << 12)
def _series(loop: Loop) -> int:
    """Returns ``1 + x + x**2 + ...`` for a loop, where x is what going on once multiplies by."""
    n, out, (step,) = loop
    ratio = _S(step) * _R(out) % PRIME
    return (_S(n * step) * _R(n * out) - 1) * _inverse(out, step) % PRIME if ratio != 1 else n


@lru_cache(maxsize=1 << 10)
def _inverse(out: int, step: int) -> int:
    return pow(_S(step) * _R(out) - 1, -1, PRIME)
