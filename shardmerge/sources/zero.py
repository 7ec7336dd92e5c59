"""DeepSpeed ZeRO partitions: where the elements of each parameter lie in the rank files.

Layouts read in DeepSpeed 0.9 to 0.19 files (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``bf16_optimizer.py``):

* Stages 1 and 2: the parameters of a group, in ``param_shapes`` order, make one flat group, cut in equal parts; rank d
  holds part d. Padding stands at the end and is usually cut off before saving. ``param_alignment_paddings`` (0.19) says
  how many elements to skip after each parameter.
* Stage 3: every parameter by itself is cut in ``ceil(numel / world)`` elements a rank; a rank's tensor of a sub-group
  is those chunks one after the other. The padding of the last chunk is uninitialised memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import overload

from shardmerge.dtypes import DType
from shardmerge.tensors import Extent, Piece, Shape


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
class FlatGroup:
    """One parameter group of stages 1 and 2, over all ranks.

    Attributes
    ----------
    dtype
        Of the partitions: F32, or 16-bit with ``bf16_master_weights_and_grads``.
    partitions
        By rank.
    starts
        First element of each partition in the concatenation of all of them; one more for the end.
    """

    dtype: DType
    partitions: tuple[Partition, ...]
    starts: tuple[int, ...]

    @staticmethod
    def of(dtype: DType, partitions: Sequence[Partition]) -> FlatGroup:
        """Returns the group of these partitions, in rank order."""
        starts = tuple(accumulate((part.numel for part in partitions), initial=0))
        return FlatGroup(dtype, tuple(partitions), starts)

    @property
    def numel(self) -> int:
        """Elements that the ranks hold together."""
        return self.starts[-1]

    def pieces(self, start: int, count: int) -> tuple[Piece, ...]:
        """Returns the pieces of the parameter at elements ``[start, start + count)`` of the group."""
        found: list[Piece] = []
        done = 0
        rank = bisect_right(self.starts, start) - 1
        while done < count:
            inside = start + done - self.starts[rank]
            take = min(count - done, self.partitions[rank].numel - inside)
            if take > 0:
                size = self.dtype.itemsize
                extent = self.partitions[rank].extent.slice(inside * size, take * size)
                found.append(Piece(done, take, extent))
                done += take
            rank += 1
        return tuple(found)


class Fragments(Sequence[Partition]):
    """The fragments of one frozen ZeRO-3 parameter, one a rank, of equal length: a number each until asked for.

    Parameters
    ----------
    files
        By rank, absolute.
    offsets
        By rank, the offsets in bytes of the fragments of all frozen parameters.
    index
        Which of them.
    numel, itemsize
        Elements of a fragment, and bytes of an element.
    """

    __slots__ = ("_files", "_index", "_itemsize", "_numel", "_offsets")

    def __init__(
        self, files: Sequence[str], offsets: Sequence[Sequence[int]], index: int, numel: int, itemsize: int
    ) -> None:
        self._files = files
        self._offsets = offsets
        self._index = index
        self._numel = numel
        self._itemsize = itemsize

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Partition: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Partition]: ...
    def __getitem__(self, index: int | slice) -> Partition | Sequence[Partition]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        offset = self._offsets[index][self._index]
        return Partition(Extent(self._files[index], offset, self._numel * self._itemsize), self._numel)


class RankChunks(Sequence[Piece]):
    """The pieces of one ZeRO-3 parameter, one a rank, computed on demand.

    Parameters
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

    __slots__ = ("_chunk", "_itemsize", "_length", "_numel", "_partitions", "_start")

    def __init__(self, partitions: Sequence[Partition], itemsize: int, start: int, numel: int) -> None:
        self._partitions = partitions
        self._itemsize = itemsize
        self._start = start
        self._numel = numel
        self._chunk = chunk_numel(numel, len(partitions))
        self._length = -(-numel // self._chunk) if numel else 0

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        rank = index % self._length
        first = rank * self._chunk
        count = min(self._chunk, self._numel - first)
        extent = self._partitions[rank].extent.slice(self._start * self._itemsize, count * self._itemsize)
        return Piece(first, count, extent)

    def __iter__(self) -> Iterator[Piece]:
        return (self[i] for i in range(len(self)))


def chunk_numel(numel: int, world: int) -> int:
    """Returns the elements each rank holds of a ZeRO-3 parameter: ``ceil(numel / world)``."""
    return -(-numel // world)


def flat_offsets(shapes: Sequence[Shape], paddings: Sequence[int]) -> tuple[int, ...]:
    """Returns where each parameter starts in its flat group, and where the last one ends.

    ``paddings`` are the elements to skip after each parameter (``param_alignment_paddings``), empty for none.
    """
    skips = paddings or (0,) * len(shapes)
    steps = (prod(shape) + skip for shape, skip in zip(shapes, skips, strict=True))
    return tuple(accumulate(steps, initial=0))
