"""DeepSpeed ZeRO partitions: where the elements of each parameter lie in the rank files.

Layouts read in DeepSpeed 0.9 to 0.19 files (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``bf16_optimizer.py``):

* Stages 1 and 2: the parameters of a group, in ``param_shapes`` order, make one flat group, cut in equal parts; rank d
  holds part d. Padding stands at the end and is usually cut off before saving. ``param_alignment_paddings`` (0.19) says
  how many elements to skip after each parameter.
* Stage 3: every parameter by itself is cut in equal chunks, one a rank (``tensors.ranks``); a rank's tensor of a
  sub-group is those chunks one after the other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from shardmerge.dtypes import DType
from shardmerge.tensors import Piece, Shape
from shardmerge.tensors.ranks import Partition


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


def flat_offsets(shapes: Sequence[Shape], paddings: Sequence[int]) -> tuple[int, ...]:
    """Returns where each parameter starts in its flat group, and where the last one ends.

    ``paddings`` are the elements to skip after each parameter (``param_alignment_paddings``), empty for none.
    """
    skips = paddings or (0,) * len(shapes)
    steps = (prod(shape) + skip for shape, skip in zip(shapes, skips, strict=True))
    return tuple(accumulate(steps, initial=0))
