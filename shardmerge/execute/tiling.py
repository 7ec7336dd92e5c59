"""The boxes that tile a tensor, as arrays: which of them a block of it meets, and where. No object of Python a box."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shardmerge.tensors import Box, Boxes, Shape, Strided
from shardmerge.tensors.strides import row_major


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a box and a block of a tensor have in common.

    Attributes
    ----------
    box
        One of the tensor's.
    start
        Its first element, in the order in which the box lies in its file.
    part
        Where it is in the block.
    """

    box: Box
    start: int
    part: tuple[slice, ...]


class Tiling:
    """Finds boxes by place; ``memory.tiling_bytes`` says what it allocates.

    Parameters
    ----------
    held
        What is looked through.
    """

    def __init__(self, held: Boxes) -> None:
        self.held = held
        self._lows = np.array([box.offsets for box in held.boxes], np.int64)
        self._highs = self._lows + np.array([box.shape for box in held.boxes], np.int64)
        self._strides = np.array([_strides(box) for box in held.boxes], np.int64)

    def meet(self, index: Shape, sizes: Shape) -> Iterator[Meeting]:
        """Yields what the boxes have of a block, in the order of the boxes.

        Parameters
        ----------
        index, sizes
            The block's first element and its shape.
        """
        first = np.array(index, np.int64)
        lows, highs = np.maximum(self._lows, first), np.minimum(self._highs, first + np.array(sizes, np.int64))
        found = np.flatnonzero((lows < highs).all(axis=1))
        lows, highs = lows[found], highs[found]
        starts = ((lows - self._lows[found]) * self._strides[found]).sum(axis=1)
        places = zip(found.tolist(), starts.tolist(), (lows - first).tolist(), (highs - first).tolist(), strict=True)
        for at, start, low, high in places:
            yield Meeting(self.held.boxes[at], start, tuple(map(slice, low, high)))


def _strides(box: Box) -> tuple[int, ...]:
    return box.held.strides if isinstance(box.held, Strided) else row_major(box.shape)
