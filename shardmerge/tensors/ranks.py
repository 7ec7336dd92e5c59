"""The rank rule of ZeRO-3: where the elements of a parameter lie that every rank holds an equal share of.

A value of a few numbers beside a table that all parameters share. Its pieces are made when asked for: a parameter of
1,024 ranks has 1,024 of them, and a model of a thousand parameters a million.

ZeRO-3 cuts every parameter by itself in ``ceil(numel / world)`` elements a rank (DeepSpeed 0.9 to 0.19,
``runtime/zero/partition_parameters.py``); the padding of the last share is uninitialised memory, and no piece holds it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

from shardmerge.tensors.entries import Extent, Piece


@dataclass(frozen=True, slots=True)
class Partition:
    """The flat tensor that one rank holds of a group: dense, 1-D.

    Attributes
    ----------
    extent
        Its bytes, without the padding that its storage may have.
    numel
        Its elements.
    """

    extent: Extent
    numel: int


@dataclass(frozen=True, slots=True)
class Fragments:
    """The fragments of one frozen ZeRO-3 parameter, one a rank, of equal length: a number each until asked for.

    Attributes
    ----------
    files
        By rank, absolute; shared by all frozen parameters.
    offsets
        By rank, the offsets in bytes of the fragments of all frozen parameters, as an array of ``q``; shared, too.
    index
        Which of them.
    numel, itemsize
        Elements of a fragment, and bytes of an element.
    """

    files: tuple[str, ...]
    offsets: tuple[array[int], ...]
    index: int
    numel: int
    itemsize: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rank: int) -> Partition:
        extent = Extent(self.files[rank], self.offsets[rank][self.index], self.numel * self.itemsize)
        return Partition(extent, self.numel)

    def __hash__(self) -> int:
        """The tables stay out but for their first rows: equal values have equal ones, and all ranks take long."""
        return hash((len(self.files), self.files[:1], self.index, self.numel, self.itemsize))


Partitions: TypeAlias = "tuple[Partition, ...] | Fragments"


@dataclass(frozen=True, slots=True)
class RankChunks(Sequence[Piece]):
    """The pieces of one ZeRO-3 parameter, one a rank, computed on demand.

    Equal by content, as every value here; two rules over one and the same table are compared without a look at it.

    Attributes
    ----------
    partitions
        The sub-group's flat tensors (or the frozen fragments), by rank; shared by all parameters of the sub-group.
    itemsize
        Bytes per element.
    start
        First element of the parameter's chunk in every rank's tensor.
    numel
        Elements of the parameter, without padding.
    """

    partitions: Partitions
    itemsize: int
    start: int
    numel: int

    def __len__(self) -> int:
        return -(-self.numel // self._chunk) if self.numel else 0

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        length, chunk = len(self), self._chunk
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(length))]
        if not -length <= index < length:
            raise IndexError(index)
        rank = index % length
        first = rank * chunk
        count = min(chunk, self.numel - first)
        extent = self.partitions[rank].extent.slice(self.start * self.itemsize, count * self.itemsize)
        return Piece(first, count, extent)

    def __iter__(self) -> Iterator[Piece]:
        return (self[i] for i in range(len(self)))

    def __hash__(self) -> int:
        """The table stays out but for its first row: equal values have equal ones, and all ranks take long."""
        return hash((len(self.partitions), self.partitions[0], self.itemsize, self.start, self.numel))

    @property
    def _chunk(self) -> int:
        return chunk_numel(self.numel, len(self.partitions))


def chunk_numel(numel: int, world: int) -> int:
    """Returns the elements each rank holds of a ZeRO-3 parameter: ``ceil(numel / world)``."""
    return -(-numel // world)
