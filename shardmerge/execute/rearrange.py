"""Copies between arrays of different strides, in blocks that the caches hold.

numpy copies element by element where source and target have no axis in common along which both are contiguous: 0.24
to 0.44 GB/s of CPU time for bf16 matrices of 4096 columns. Here neighbours in the target are first packed into eight
bytes, in a block that stays in the cache, and words of eight bytes are then put where they belong: 1.1 to 1.4 GB/s for
bf16, 1.2 to 2.0 for fp32, on the same busy machine. Blocks of 64 x 64 without packing gave 0.5 to 0.7.
"""

from __future__ import annotations

import numpy as np

from shardmerge.ops.arrays import Array

# Along the target's and the source's contiguous axis, in elements.
_ROWS, _COLUMNS = 128, 256

# Shorter axes leave nothing to pack.
_SHORTEST = 16

_WORD = 8


def rearrange(target: Array, source: Array) -> None:
    """Copies ``source`` to ``target``: one shape, one unsigned type, any strides; they must not overlap.

    Allocates at most ``memory.REARRANGING`` bytes.
    """
    ahead, across = _contiguous(target), _contiguous(source)
    if ahead is None or across is None or ahead == across or target.itemsize >= _WORD:
        target[...] = source
        return
    target, source = (np.moveaxis(array, (across, ahead), (-2, -1)) for array in (target, source))
    for index in np.ndindex(*target.shape[:-2]):
        _transpose(target[index], source[index])


def _contiguous(array: Array) -> int | None:
    """Returns the axis along which elements lie side by side, if it is worth packing."""
    for axis, (n, step) in enumerate(zip(array.shape, array.strides, strict=True)):
        if step == array.itemsize and n >= _SHORTEST:
            return axis
    return None


def _transpose(target: Array, source: Array) -> None:
    """Copies a matrix whose target is contiguous along axis 1 and whose source is along axis 0."""
    lanes = _WORD // target.itemsize
    columns, rows = target.shape
    even = rows - rows % lanes
    target[:, even:] = source[:, even:]
    packed = np.empty((_ROWS // lanes, _COLUMNS, lanes), target.dtype)
    for row in range(0, even, _ROWS):
        stop = min(row + _ROWS, even)
        for column in range(0, columns, _COLUMNS):
            part = slice(column, column + _COLUMNS)
            block = packed[: (stop - row) // lanes, : min(_COLUMNS, columns - column)]
            for lane in range(lanes):
                block[:, :, lane] = source[part, row + lane : stop : lanes].T
            target[part, row:stop].view(np.uint64)[...] = block.view(np.uint64)[:, :, 0].T
