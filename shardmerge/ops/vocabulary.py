"""New rows for a vocabulary that grew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.dtypes import DTYPES
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Arithmetic, Meta, State, Stream

BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class NewRows(Arithmetic):
    rows: int
    how: str = "mean"
    row: int = 0
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.rows} new rows ({self.how})"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        return Meta(DTYPES["F64"], (self.rows, *inputs[0].shape[1:]))

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        return ((0, 0),)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        width = inputs[0].shape[1]
        return 16 * width + BLOCK_ROWS * width * (inputs[0].dtype.itemsize + 8)

    def prepare(self, inputs: Sequence[Stream]) -> State:
        rows, width = inputs[0].meta.shape
        total = np.zeros(width, np.float64)
        for first in range(0, rows, BLOCK_ROWS):
            n = min(BLOCK_ROWS, rows - first)
            total += inputs[0].read(first * width, n * width).reshape(n, width).astype(np.float64).sum(axis=0)
        return total / max(rows, 1)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        return 16 * count

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        mean = np.asarray(state)
        np.copyto(out, np.take(mean, np.arange(start, start + len(out)) % len(mean)))
        return 0
