"""What an op is. Two families: by tile, and over the whole input.

An op is a frozen value: its fields are its parameters and stand in the plan. It sees arrays, never names or files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from shardmerge.ops.arrays import Array


class TileOp(Protocol):
    """Element ``i`` of the output is made of element ``i`` of the input, so any tile can be computed alone."""

    @property
    def label(self) -> str:
        """How the plan calls it, parameters included, e.g. ``cast BF16``."""

    def workspace(self, numel: int) -> int:
        """Returns the bytes allocated inside ``apply`` for a tile of ``numel`` elements, at most."""

    def apply(self, tile: Array, out: Array) -> int:
        """Fills ``out`` from ``tile``, 1-D and of equal length; returns how many finite values overflowed."""


class ReduceOp(Protocol):
    """The output needs the whole input, seen once as a stream of row blocks, and is small."""

    @property
    def label(self) -> str:
        """How the plan calls it."""

    def workspace(self, width: int) -> int:
        """Returns the bytes of state for rows of ``width`` elements, at most, a block's included."""

    def apply(self, blocks: Iterable[Array], width: int, out: Array) -> int:
        """Fills ``out`` (rows x width, flat) from 2-D blocks of whole rows; returns the count of overflows."""
