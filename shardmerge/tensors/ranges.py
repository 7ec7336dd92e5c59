"""Flat ranges of one tensor in many files: three numbers each until a piece is asked for.

A model of 405 billion parameters that 1,024 ranks saved is a million ranges. As pieces they take 250 bytes each, here
20.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from shardmerge.tensors.entries import Extent, Piece


@dataclass(frozen=True, slots=True, eq=False)
class FlatRanges(Sequence[Piece]):
    """Pieces of a tensor, each dense in an extent; equal to any sequence of equal pieces.

    Attributes
    ----------
    files
        Paths, absolute; all tensors of a checkpoint share them.
    itemsize
        Bytes of an element.
    starts
        First element of each range, ascending; behind the last its end. One more than there are ranges.
    which
        The number of each one's file.
    offsets
        Where it begins there, in bytes.
    """

    files: Sequence[str]
    itemsize: int
    starts: array[int]
    which: array[int]
    offsets: array[int]

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        start = self.starts[at]
        count = self.starts[at + 1] - start
        return Piece(start, count, Extent(self.files[self.which[at]], self.offsets[at], count * self.itemsize))

    def __iter__(self) -> Iterator[Piece]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == one for mine, one in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))
