"""New rows for a vocabulary that grew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shardmerge.dtypes import DTYPES, DType
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.casts import Cast

# Rows summed at a time. Part of the result (float64 addition is not associative), so it never depends on the budget.
BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class MeanRows:
    """Rows equal to the mean of all rows of the input, summed in float64 and rounded once.

    XTuner and transformers draw new rows from a normal distribution around that mean, unseeded; the mean itself is
    the same on every run, and gives a new token neither a large nor a zero logit.

    Attributes
    ----------
    source, target
        Float types of the input and the output.
    rows
        New rows.
    """

    source: DType
    target: DType
    rows: int

    @property
    def label(self) -> str:
        """``64 new rows (mean) in BF16``."""
        return f"{self.rows} new rows (mean) in {self.target}"

    def workspace(self, width: int) -> int:
        """Returns the bytes of the sum, one block as stored and as float64, and the rows as float64 and final."""
        block = BLOCK_ROWS * width * (self.source.itemsize + 8)
        return 8 * width + block + self.rows * width * (8 + self.target.itemsize)

    def apply(self, blocks: Iterable[Array], width: int, out: Array) -> int:
        """Fills ``out`` with the mean row, ``rows`` times; returns the count of overflowed values."""
        total = np.zeros(width, np.float64)
        count = 0
        for block in blocks:
            total += block.astype(np.float64).sum(axis=0)
            count += len(block)
        mean = total / max(count, 1)
        if self.target.name == "F64":
            np.copyto(out, np.tile(mean, self.rows))
            return 0
        row = np.empty(width, numpy_dtype(self.target))
        wide = Cast(DTYPES["F64"], self.target)
        overflows = wide.apply(mean, row)
        np.copyto(out, np.tile(row, self.rows))
        return overflows * self.rows
