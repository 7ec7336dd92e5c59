"""Deltas, a model less its base: made part by part, and added up where they agree in sign."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.contract import Arithmetic, Meta, State, Stream, result_dtype
from shardmerge.ops.parts import CALL_BYTES, OVERFLOW_BYTES, PART, count_overflows, parts, rows_of_part
from shardmerge.ops.pointwise import check_weights, infer_floats


class Merge(Arithmetic):
    """A base and models, of one shape. A state that is ``InRows`` makes parts of whole rows."""

    __slots__ = ()

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        check_weights(self.label, self.given, len(inputs) - 1)
        return infer_floats(self.label, inputs, least=2)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part's buffers and of its masks."""
        return min(count, self.step(inputs)) * (room_bytes(inputs) + 2 * OVERFLOW_BYTES) + CALL_BYTES

    def step(self, inputs: Sequence[Meta]) -> int:
        """Returns the elements of a part, whole rows where the op makes them together."""
        return rows_of_part(self.unit(inputs))

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` from tiles as long as it, base first."""
        lost = 0
        step = rows_of_part(state.row) if isinstance(state, InRows) else PART
        room = Room.of(len(out), out.dtype, step)
        with np.errstate(all="ignore"):
            for part in parts(len(out), step):
                base, *models = (tile[part] for tile in tiles)
                self._part(state, room.cut(base), models, start + part.start, out[part])
                lost += count_overflows(out[part], (base, *models))
        return lost

    @property
    def given(self) -> tuple[float, ...]:
        """The weights as written: none, or one a model."""
        return ()

    @abstractmethod
    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        """Fills a part; its base is in ``room``."""


@dataclass(frozen=True, slots=True)
class InRows:
    """State of a merge whose rows of so many elements are made together."""

    row: int = 1


@dataclass(frozen=True, slots=True)
class Room:
    """Buffers of a part, in the type that is computed in.

    Attributes
    ----------
    base, delta
        Widened, and of the model that was asked for last.
    sign, divisor, term
        For the election of signs.
    key
        For the magnitudes of a delta, float32.
    """

    base: Array
    delta: Array
    sign: Array
    divisor: Array
    term: Array
    key: Array

    @classmethod
    def of(cls, count: int, dtype: np.dtype[Any], step: int = PART) -> Room:
        """Returns buffers for parts of so many elements, or of ``step`` where that is less."""
        size = min(count, step)
        return cls(*(*np.empty((5, size), dtype), np.empty(size, np.float32)))

    def cut(self, base: Array) -> Room:
        """Returns the buffers as long as a part, with its base in them."""
        every = (self.base, self.delta, self.sign, self.divisor, self.term, self.key)
        room = Room(*(buffer[: len(base)] for buffer in every))
        np.copyto(room.base, base, casting="unsafe")
        return room

    def less_base(self, model: Array, weight: float = 1.0) -> Array:
        """Returns ``weight * (model - base)``, in memory that is used again for the next."""
        np.copyto(self.delta, model, casting="unsafe")
        np.subtract(self.delta, self.base, out=self.delta)
        return self.delta if weight == 1 else np.multiply(self.delta, self.delta.dtype.type(weight), out=self.delta)


def read_deltas(inputs: Sequence[Stream], row: int = 1) -> Iterator[tuple[int, Room, tuple[Stream, ...], int]]:
    """Yields first index, buffers with the base in them, the models, and the length of every part of the inputs."""
    base, *models = inputs
    numel = prod(base.meta.shape)
    step = rows_of_part(row)
    whole = Room.of(numel, numpy_dtype(result_dtype([one.meta for one in inputs])), step)
    with np.errstate(all="ignore"):
        for part in parts(numel, step):
            count = part.stop - part.start
            yield part.start, whole.cut(base.read(part.start, count)), tuple(models), count


def room_bytes(inputs: Sequence[Meta]) -> int:
    """Returns the bytes of a ``Room``, an element."""
    return 5 * result_dtype(inputs).itemsize + 4


def weights_of(given: tuple[float, ...], models: int) -> tuple[float, ...]:
    """Returns one weight a model, 1 where none are given."""
    return given or (1.0,) * models


def elect_sign(delta: Callable[[int], Array], models: int, out: Array, room: Room) -> Array:
    """Fills the room's sign with 1 or -1, that of the sum of the deltas; ``out`` is 0 then. Returns a mask to use."""
    out[...] = 0
    for index in range(models):
        np.add(out, delta(index), out=out)
    agrees = np.greater_equal(out, 0)
    np.multiply(agrees, 2, out=room.sign, dtype=out.dtype, casting="unsafe")
    np.subtract(room.sign, 1, out=room.sign)
    out[...] = 0
    return agrees


def add_agreeing(
    delta: Callable[[int], Array], weights: Sequence[float], out: Array, room: Room, *, normalize: bool
) -> None:
    """Fills ``out`` with the sum of the weighted deltas of the elected sign; each is made twice rather than kept.

    Masks are multiplied with: to add, or to set, where one is true takes numpy 4 to 6 ns an element, ten times as long.
    """
    agrees = elect_sign(delta, len(weights), out, room)
    room.divisor[...] = 0
    for index, weight in enumerate(weights):
        found = delta(index)
        np.multiply(found, room.sign, out=room.term)
        np.greater(room.term, 0, out=agrees)
        np.multiply(found, agrees, out=found)
        np.add(out, found, out=out)
        np.multiply(agrees, out.dtype.type(weight), out=room.term)
        np.add(room.divisor, room.term, out=room.divisor)
    if normalize:
        np.equal(room.divisor, 0, out=agrees)
        np.add(room.divisor, agrees, out=room.divisor)  # 1 where it is 0
        np.divide(out, room.divisor, out=out)
