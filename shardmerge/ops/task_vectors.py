"""What the merges of deltas have in common: what is kept of each, how it is scaled, and how all are added up."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import fsum, prod
from typing import TypeVar

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Meta, State, Stream
from shardmerge.ops.deltas import InRows, Merge, Room, add_agreeing, read_deltas, room_bytes, weights_of
from shardmerge.ops.parts import CALL_BYTES
from shardmerge.ops.pointwise import check_weights, infer_floats
from shardmerge.ops.selection import KeyBlocks, keys

_Value = TypeVar("_Value")

# A sum of weights below this divides nothing: mergekit's.
_NO_WEIGHT = 1e-8
# A norm below this rescales nothing: mergekit's ``rescaled_masked_tensor``.
_NO_NORM = 1e-7


@dataclass(frozen=True, slots=True)
class Trimmed(InRows):
    """What is known of the whole tensor.

    Attributes
    ----------
    kept
        What the op found out about each model, to tell what is kept of its delta.
    divisors
        What each trimmed delta is divided by.
    """

    kept: tuple[object, ...] = ()
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVectors(Merge):
    """``base + scale * sum(w_i * trimmed(model_i - base))``.

    Attributes
    ----------
    given
        One weight a model, or none for 1 each.
    scale
        ``lambda`` in mergekit.
    normalize
        Whether the sum is divided by the sum of the weights; with ``sign_consensus`` by that of the deltas that agree.
    sign_consensus
        Whether a sign is elected for every element, and deltas of the other sign are left out, as in TIES.
    rescale
        ``l1``: a trimmed delta is given the L1 norm it had before (mergekit's ``rescale``). ``none``.
    """

    given: tuple[float, ...] = ()
    scale: float = 1.0
    normalize: bool = False
    sign_consensus: bool = False
    rescale: str = "none"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        models = len(inputs) - 1
        check_weights(self.label, self.given, models)
        for name, values in self.shares().items():
            if len(values) not in (1, models):
                raise MappingError(
                    "op-value",
                    f"{self.label}: `{name}` is neither one number nor one for each model",
                    found=f"{len(values)} for {models} models",
                    expected=f"1 or {models}",
                )
        return infer_floats(self.label, inputs, least=2)

    def shares(self) -> dict[str, tuple[float, ...]]:
        """Returns the parameters that may be one number, or one a model."""
        return {}

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the bytes of one part of all inputs, of its buffers and masks, and of what trimming needs."""
        trimming = self._trimming_peak(inputs)
        if not trimming and self.rescale != "l1":
            return 0
        part = sum(meta.dtype.itemsize for meta in inputs) + room_bytes(inputs) + len(inputs) + self._mask_bytes()
        return self.step(inputs) * part + trimming + CALL_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns what is kept of each delta and how it is scaled; reads the inputs as often as that takes."""
        row = self.unit([one.meta for one in inputs])
        models = len(inputs) - 1
        kept = self._select(inputs)
        plain = Trimmed(row, kept, (1.0,) * models)
        if self.rescale != "l1" or not prod(inputs[0].meta.shape):
            return Trimmed(row, kept, tuple(self._divisor(index) for index in range(models)))
        return Trimmed(row, kept, self._keeping_norms(inputs, plain))

    def _keeping_norms(self, inputs: Sequence[Stream], state: Trimmed) -> tuple[float, ...]:
        """Returns L1 norms of the trimmed deltas over those of the whole ones."""
        sums: list[list[tuple[float, float]]] = [[] for _ in inputs[1:]]
        for start, room, models, count in read_deltas(inputs, state.row):
            for index, model in enumerate(models):
                delta = room.less_base(model.read(start, count))
                mask = self._mask(state, index, delta, start, room)
                before = float(np.abs(delta, out=room.term).sum(dtype=np.float64))
                after = (
                    before if mask is None else float(np.multiply(room.term, mask, out=room.term).sum(dtype=np.float64))
                )
                sums[index].append((before, after))
        return tuple(_ratio(fsum(one for one, _ in each), fsum(one for _, one in each)) for each in sums)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part's buffers, and of its masks, one a model."""
        return Merge.peak(self, inputs, count) + min(count, self.step(inputs)) * (len(inputs) + self._mask_bytes())

    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        assert isinstance(state, Trimmed)
        weights = weights_of(self.given, len(models))
        # A delta may be asked for twice, its mask is made once.
        masks = [self._mask(state, index, room.less_base(model), start, room) for index, model in enumerate(models)]

        def delta(index: int) -> Array:
            found = room.less_base(models[index])
            mask, divisor = masks[index], state.divisors[index]
            if mask is not None:
                np.multiply(found, mask, out=found)  # NaN stays NaN
            if divisor != 1:
                np.divide(found, found.dtype.type(divisor), out=found)
            return np.multiply(found, found.dtype.type(weights[index]), out=found) if weights[index] != 1 else found

        if self.sign_consensus:
            add_agreeing(delta, weights, out, room, normalize=self.normalize)
        else:
            out[...] = 0
            for index in range(len(models)):
                np.add(out, delta(index), out=out)
            total = fsum(weights)
            if self.normalize and abs(total) >= _NO_WEIGHT:
                np.divide(out, out.dtype.type(total), out=out)
        if self.scale != 1:
            np.multiply(out, out.dtype.type(self.scale), out=out)
        np.add(room.base, out, out=out)

    def _trimming_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the bytes that ``_select`` allocates, 0 where it reads nothing."""
        del inputs
        return 0

    def _mask_bytes(self) -> int:
        """Returns the bytes an element that ``_mask`` allocates beside the mask."""
        return 0

    def _select(self, inputs: Sequence[Stream]) -> tuple[object, ...]:
        """Returns what the op has to know of each model."""
        return (None,) * (len(inputs) - 1)

    def _divisor(self, model: int) -> float:
        """Returns what a trimmed delta is divided by where it is not rescaled to its norm."""
        del model
        return 1.0

    @abstractmethod
    def _mask(self, state: Trimmed, model: int, delta: Array, start: int, room: Room) -> Array | None:
        """Returns which elements of a part of a delta are kept; None for all. May use ``room``'s key and term."""


def _ratio(before: float, after: float) -> float:
    return after / before if before >= _NO_NORM and after >= _NO_NORM else 1.0


def one_a_model(values: tuple[_Value, ...], models: int) -> tuple[_Value, ...]:
    """Returns one value a model, of as many, or of one for all."""
    return values if len(values) == models else values * models


def shown(values: Sequence[float]) -> str:
    """Returns one number, or a list where they differ."""
    return str(values[0]) if len(set(values)) == 1 else str(list(values))


def keys_of(inputs: Sequence[Stream], models: Sequence[int]) -> KeyBlocks:
    """Returns the keys of deltas as ``select`` reads them: tensor i is the delta of model ``models[i]``."""

    def stream(wanted: Collection[int]) -> Iterator[tuple[int, int, Array]]:
        for start, room, every, count in read_deltas(inputs):
            for index in sorted(wanted):
                yield start, index, keys(room.less_base(every[models[index]].read(start, count)), room.key)

    return stream
