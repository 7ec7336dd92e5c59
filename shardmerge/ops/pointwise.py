"""Sums of tensors, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Arithmetic, Meta, State, result_dtype


@dataclass(frozen=True, slots=True)
class Linear(Arithmetic):
    """The sum of the inputs, each times its weight."""

    weights: tuple[float, ...]

    @property
    def label(self) -> str:
        """``linear [1, 0.5]``."""
        return f"linear {[f'{weight:g}' for weight in self.weights]}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the common shape."""
        return Meta(result_dtype(inputs), inputs[0].shape)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """One product."""
        return 16 * count

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills any range."""
        out[...] = 0
        for weight, tile in zip(self.weights, tiles, strict=True):
            out += tile.astype(out.dtype) * out.dtype.type(weight)
        return 0
