"""Results that are sums of their inputs with factors that follow from the inputs' scalar products alone.

Spherical interpolation, means on the sphere, model stock: nothing but lengths and angles decides how much of each
input there is in the result. So one pass finds the products, in float64 and in blocks of fixed size, and a second
one adds up.
Vectors are whole tensors, rows or columns. With a base they are deltas: inputs less the first one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from math import prod
from typing import TypeAlias

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Arithmetic, Meta, State, Stream
from shardmerge.ops.parts import (
    CALL_BYTES,
    OVERFLOW_BYTES,
    count_overflows,
    rows_of_part,
    weighted_sum,
    weighted_sum_bytes,
)
from shardmerge.ops.pointwise import infer_floats

# Elements that are summed at once. Part of the result: float64 addition is not associative.
_BLOCK = 1 << 16

# Scalar products [n, n, vectors] of n vectors each, float64; and factors [n, vectors].
Gram: TypeAlias = Array
Factors: TypeAlias = Array


class Spanned(Arithmetic):
    """``sum(c_i * x_i)``; with a base ``base + sum(c_i * (x_i - base))``, the base being the first input.

    A subclass has the fields ``along``, ``whole``, ``rows`` (the last axis) or ``columns`` (the first one), and
    ``from_base``, or says what they are.
    """

    __slots__ = ()

    @property
    def along(self) -> str:
        """What a vector is: ``whole``, ``rows`` or ``columns``."""
        return "whole"

    @property
    def from_base(self) -> bool:
        """Whether the first input is a base."""
        return False

    @abstractmethod
    def factors(self, gram: Gram) -> Factors:
        """Returns what every vector is multiplied with, [n, vectors], from their scalar products [n, n, vectors]."""

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        return infer_floats(self.label, inputs, least=1 + self.from_base)

    def unit(self, inputs: Sequence[Meta]) -> int:
        """Returns the elements of a row, where rows or columns are made."""
        return 1 if self.along == "whole" else _width(inputs[0].shape, self.along)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the bytes of one block of all inputs, widened, of their products, and of the factors of columns."""
        if self.along == "rows":
            return 0
        step, held = _BLOCK, 0
        if self.along == "columns":
            width = _width(inputs[0].shape, "columns")
            step, held = rows_of_part(width, _BLOCK), 8 * width * len(inputs) * (2 * len(inputs) + 8)
        return step * (sum(meta.dtype.itemsize for meta in inputs) + 8 * (len(inputs) + 1)) + held + CALL_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns the factors of the inputs, reading all once; for rows their length alone."""
        shape = inputs[0].meta.shape
        width = _width(shape, self.along)
        if self.along == "rows":
            return width
        numel = prod(shape)
        step = rows_of_part(width, _BLOCK)
        wide = np.empty((len(inputs) + 1, min(numel, step)))
        columns = self.along == "columns"
        vectors = len(inputs) - self.from_base
        gram = np.zeros((vectors, vectors, width if columns else 1))
        with np.errstate(all="ignore"):
            for start in range(0, numel, step):
                count = min(step, numel - start)
                tiles = (one.read(start, count) for one in inputs)
                rows = self._widened(tiles, wide[:, :count])
                _add_products(
                    gram,
                    rows.reshape(len(rows), -1, width) if columns else rows[:, None, :],
                    wide[-1, :count],
                    columns=columns,
                )
            found = self._of_inputs(self.factors(gram))
        return found if columns else tuple(found[:, 0].tolist())

    def _widened(self, tiles: Iterator[Array] | Sequence[Array], wide: Array) -> Array:
        """Returns the vectors of a block in float64: the last row of ``wide`` is left free."""
        for row, tile in zip(wide, tiles, strict=False):
            np.copyto(row, tile, casting="unsafe")
        if not self.from_base:
            return wide[:-1]
        np.subtract(wide[1:-1], wide[0], out=wide[1:-1])
        return wide[1:-1]

    def _of_inputs(self, factors: Factors) -> Factors:
        """Returns the factors of the inputs: the base has what the deltas leave of 1."""
        return np.concatenate([1 - factors.sum(axis=0, keepdims=True), factors]) if self.from_base else factors

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part and its masks; where rows are made, of a block widened, and of its products."""
        if self.along == "whole":
            return weighted_sum_bytes(inputs, count)
        step = min(count, rows_of_part(self.unit(inputs), _BLOCK))
        n, width = len(inputs), self.unit(inputs)
        rows = step // max(width, 1) if self.along == "rows" else width
        held = 8 * rows * (n * n + 4 * n + 16) + (24 * rows * n if self.along == "rows" else 8 * rows)
        return step * 8 * (n + 1) + held + min(count, step) * (8 + 2 * OVERFLOW_BYTES) + CALL_BYTES

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` from tiles as long as it."""
        del start
        if isinstance(state, tuple):
            return weighted_sum(state, tiles, out)
        if isinstance(state, int):
            return self._in_rows(state, tiles, out)
        assert isinstance(state, np.ndarray)
        width = state.shape[1]
        with np.errstate(all="ignore"):
            _scaled_sum(state[:, None, :], tiles, out, width)
            return count_overflows(out, tiles)

    def _in_rows(self, width: int, tiles: Sequence[Array], out: Array) -> int:
        step = rows_of_part(width, _BLOCK)
        wide = np.empty((len(tiles) + 1, min(len(out), step)))
        vectors = len(tiles) - self.from_base
        with np.errstate(all="ignore"):
            for low in range(0, len(out), step):
                part = slice(low, min(low + step, len(out)))
                some = [tile[part] for tile in tiles]
                room = wide[:, : len(some[0])]
                rows = self._widened(some, room).reshape(vectors, -1, width)
                gram = np.zeros((vectors, vectors, rows.shape[1]))
                _add_products(gram, rows, room[-1], columns=False)
                _scaled_sum(self._of_inputs(self.factors(gram))[:, :, None], some, out[part], width)
            return count_overflows(out, tiles)


def _width(shape: tuple[int, ...], along: str) -> int:
    """Returns the length of a row: along columns the axes behind the first are one row, however many."""
    if along == "whole" or not shape:
        return 1
    return max(shape[-1] if along == "rows" else prod(shape[1:]), 1)


def _add_products(gram: Gram, vectors: Array, room: Array, *, columns: bool) -> None:
    """Adds the products of vectors, [n, rows, width], each with each, summed over rows or over columns."""
    product = room.reshape(vectors.shape[1:])
    for i, left in enumerate(vectors):
        for j in range(i, len(vectors)):
            np.multiply(left, vectors[j], out=product)
            gram[i, j] += product.sum(axis=0 if columns else 1)
            gram[j, i] = gram[i, j]


def _scaled_sum(factors: Array, tiles: Sequence[Array], out: Array, width: int) -> None:
    """Fills ``out`` with the sum of tiles times factors that go with [rows, width], a few rows at a time."""
    narrow = factors.astype(out.dtype)
    step = rows_of_part(width, _BLOCK)
    term = np.empty(min(len(out), step), out.dtype)
    for low in range(0, len(out), step):
        made = out[low : low + step].reshape(-1, width)
        room = term[: made.size].reshape(made.shape)
        for index, tile in enumerate(tiles):
            to = room if index else made
            np.copyto(to, tile[low : low + step].reshape(made.shape), casting="unsafe")
            np.multiply(to, narrow[index], out=to)
            if index:
                np.add(made, room, out=made)
