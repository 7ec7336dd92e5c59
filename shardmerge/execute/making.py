"""Arithmetic: reads what a range of a computed tensor is made of and applies its op, a chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardmerge.execute.ranges import Ranges
from shardmerge.ops.arrays import Array, as_array
from shardmerge.ops.casts import Cast
from shardmerge.ops.contract import Arithmetic, Meta, State
from shardmerge.plan.memory import chunk_elements, tile_elements
from shardmerge.tensors import Made, TensorEntry

# Most computed tensors that an assembler remembers; one is made of a few at most.
_MOST_MAKINGS = 64


@dataclass(frozen=True, slots=True)
class _Making:
    """What is the same for every tile of a computed tensor; 20 us to find, a cast of 200 KiB."""

    held: Made
    op: Arithmetic
    metas: tuple[Meta, ...]
    unit: int
    step: int
    chunk: int


class Maker:
    """Fills ranges of computed tensors for an assembler, which reads what they are made of."""

    def __init__(self, assembler: Ranges) -> None:
        self._assembler = assembler
        self._states: dict[int, tuple[Made, State]] = {}
        self._makings: dict[int, _Making] = {}

    def forget(self) -> None:
        """Lets the states of ops go."""
        self._states.clear()

    def fill(self, entry: TensorEntry, held: Made, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes of the tensor from its element ``start`` on."""
        making = self._making(entry, held)
        unit, size = making.unit, entry.dtype.itemsize
        state = self._state(held, making.op)
        stop = start + len(out) // size
        low = start - start % unit
        while low < stop:
            high = min(low + making.step, entry.numel, -(-stop // unit) * unit)
            inside = out[(low - start) * size : (high - start) * size] if low >= start and high <= stop else None
            made = inside if inside is not None else self._assembler.take((high - low) * size)
            self._apply(making, state, low, as_array(made, entry.dtype))
            if inside is None:
                first, last = max(low, start), min(high, stop)
                out[(first - start) * size : (last - start) * size] = made[(first - low) * size : (last - low) * size]
                self._assembler.release(made)
            low = high

    def _making(self, entry: TensorEntry, held: Made) -> _Making:
        found = self._makings.get(id(held))
        if found is None:
            if len(self._makings) == _MOST_MAKINGS:
                self._makings.clear()
            op, metas = arithmetic(held), tuple(Meta.of(base) for base in held.bases)
            step, chunk = tile_elements(entry, self._assembler.tile), chunk_elements(entry, held, self._assembler.tile)
            found = self._makings[id(held)] = _Making(held, op, metas, op.unit(metas), step, chunk)
        return found

    def _apply(self, making: _Making, state: State, start: int, out: Array) -> None:
        """Reads what the elements are made of at once, and makes them a chunk at a time."""
        op, bases = making.op, making.held.bases
        ranges = op.ranges(making.metas, start, len(out))
        tiles = [self._assembler.view(base, first, count) for base, (first, count) in zip(bases, ranges, strict=True)]
        arrays = [as_array(tile, base.dtype) for tile, base in zip(tiles, bases, strict=True)]
        for low in range(0, len(out), making.chunk):
            part = out[low : low + making.chunk]
            wanted = op.ranges(making.metas, start + low, len(part)) if len(part) < len(out) else ranges
            inputs = [
                array[first - begin : first - begin + count]
                for array, (first, count), (begin, _) in zip(arrays, wanted, ranges, strict=True)
            ]
            if self._assembler.device is not None and isinstance(op, Cast):
                self._assembler.overflowed += self._assembler.device.apply(op, inputs[0], part)
            else:
                self._assembler.overflowed += op.apply(state, inputs, start + low, part)
            del inputs
        del arrays
        for tile in tiles:
            self._assembler.release(tile)

    def _state(self, held: Made, op: Arithmetic) -> State:
        if id(held) not in self._states:
            state = self._shared(held, op)
            if state is None:
                state = op.prepare([_Stream(self._assembler, base) for base in held.bases])
            self._states[id(held)] = (held, state)
        return self._states[id(held)][1]

    def _shared(self, held: Made, op: Arithmetic) -> State:
        """The state that was found for another part of the same, where there is one."""
        others = (
            state
            for other, state in self._states.values()
            if state is not None and arithmetic(other).preparing == op.preparing and other.bases == held.bases
        )
        return next(others, None)


class _Stream:
    """An input that an op reads ahead of its tiles."""

    def __init__(self, assembler: Ranges, entry: TensorEntry) -> None:
        self._assembler = assembler
        self._entry = entry

    @property
    def meta(self) -> Meta:
        return Meta.of(self._entry)

    def read(self, start: int, count: int) -> Array:
        data = np.empty(count * self._entry.dtype.itemsize, np.uint8)
        self._assembler.fill(self._entry, start, data.data)
        return as_array(data.data, self._entry.dtype)


def arithmetic(held: Made) -> Arithmetic:
    """Returns the op of a computed tensor."""
    if not isinstance(held.recipe, Arithmetic):
        raise TypeError(f"{held.recipe.label} does not compute")
    return held.recipe
