"""Merges by how models agree on an element: SCE (select, calculate, erase), and RAM (reinforced agent merging)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import fsum, prod

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Meta, OpKind, Param, State, Stream
from shardmerge.ops.deltas import Merge, Room, elect_sign, read_deltas, room_bytes
from shardmerge.ops.parts import CALL_BYTES, PART, parts
from shardmerge.ops.pointwise import number
from shardmerge.ops.selection import Kept, kept, keys, select_peak

# mergekit's: the least sum of weights that is divided by.
_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class _Weighted:
    """What SCE knows of the whole: which elements vary enough, None for all, and one weight a model."""

    chosen: Kept | None
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sce(Merge):
    """Select, calculate, erase (Wan et al., "FuseChat", 2024), as mergekit's ``sce``.

    Of all elements ``floor(select_topk * n)`` are kept, the ones in which the models vary most, n being the number of
    those in which they vary at all. A model's weight is the mean square of its delta, over that of all. The sign of an
    element is that of the sum of the deltas, + for 0; deltas of that sign are averaged by weight.

    Attributes
    ----------
    select_topk
        From 0 to 1, where all elements are kept.
    """

    select_topk: float = 1.0

    @property
    def label(self) -> str:
        """``sce 0.1``."""
        return f"sce {self.select_topk}"

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the bytes of one part of all inputs, of its buffers, of variances, and of a histogram."""
        part = sum(meta.dtype.itemsize for meta in inputs) + room_bytes(inputs)
        selecting = PART * (1 + _VARIANCE_BYTES) + select_peak(1) if self.select_topk < 1 else 0
        return PART * part + selecting + CALL_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns the selection and the weights; reads all inputs up to five times."""
        numel = prod(inputs[0].meta.shape)
        chosen = None
        if self.select_topk < 1 and numel:
            count = int(_varying(inputs) * self.select_topk)
            (chosen,) = kept(lambda _: _variances(inputs), [count], numel)
        return _Weighted(chosen, _energies(inputs, chosen))

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part's buffers, and of its variances."""
        selected = 1 + _VARIANCE_BYTES if self.select_topk < 1 else 0
        return Merge.peak(self, inputs, count) + min(count, PART) * selected

    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        assert isinstance(state, _Weighted)
        mask = None if state.chosen is None else state.chosen.mask(_variance_keys(models), start)

        def delta(index: int) -> Array:
            found = room.less_base(models[index])
            return found if mask is None else np.multiply(found, mask, out=found)

        agrees = elect_sign(delta, len(models), out, room)
        room.divisor[...] = 0
        for index, weight in enumerate(state.weights):
            found = delta(index)
            np.multiply(found, room.sign, out=room.term)
            np.greater(room.term, 0, out=agrees)
            np.multiply(agrees, out.dtype.type(weight), out=room.term)
            np.add(room.divisor, room.term, out=room.divisor)
            np.multiply(found, room.term, out=found)
            np.add(out, found, out=out)
        np.maximum(room.divisor, out.dtype.type(_LEAST), out=room.divisor)
        np.divide(out, room.divisor, out=out)
        np.add(room.base, out, out=out)


# Three float64 rows and a float32 one, an element.
_VARIANCE_BYTES = 8 + 8 + 8 + 4


def _variance_keys(models: Sequence[Array]) -> Array:
    """Returns the keys of the variance of every element, 0 exactly where all models are equal: made of differences."""
    first = models[0].astype(np.float64)
    total, squares = np.zeros((2, len(first)))
    for model in models[1:]:
        apart = np.subtract(model, first, dtype=np.float64, casting="unsafe")
        total += apart
        np.multiply(apart, apart, out=apart)
        squares += apart
    # The mean of the squares less the square of the mean, in float64, of differences: what cancels is 2**-52 of it.
    np.divide(squares, len(models), out=squares)
    np.divide(total, len(models), out=total)
    np.multiply(total, total, out=total)
    np.subtract(squares, total, out=squares)
    return keys(squares)


def _variances(inputs: Sequence[Stream]) -> Iterator[tuple[int, int, Array]]:
    with np.errstate(all="ignore"):
        for part in parts(prod(inputs[0].meta.shape)):
            models = [one.read(part.start, part.stop - part.start) for one in inputs[1:]]
            yield part.start, 0, _variance_keys(models)


def _varying(inputs: Sequence[Stream]) -> int:
    return sum(int(np.count_nonzero(block)) for _, _, block in _variances(inputs))


def _energies(inputs: Sequence[Stream], chosen: Kept | None) -> tuple[float, ...]:
    """Returns the mean squares of the deltas over their sum; equal ones where there is next to nothing."""
    sums: list[list[float]] = [[] for _ in inputs[1:]]
    for start, room, models, count in read_deltas(inputs):
        tiles = [model.read(start, count) for model in models]
        mask = None if chosen is None else chosen.mask(_variance_keys(tiles), start)
        for index, tile in enumerate(tiles):
            found = room.less_base(tile)
            np.multiply(found, found, out=found)
            if mask is not None:
                np.multiply(found, mask, out=found)
            sums[index].append(float(found.sum(dtype=np.float64)))
    numel = max(prod(inputs[0].meta.shape), 1)
    means = [fsum(each) / numel if all(map(np.isfinite, each)) else float("nan") for each in sums]
    total = sum(means)
    if abs(total) < _LEAST:
        return (1 / len(means),) * len(means)
    return tuple(mean / total for mean in means)


@dataclass(frozen=True, slots=True)
class Ram(Merge):
    """Reinforced agent merging: deltas that several models share are averaged, those of one model are kept whole.

    mergekit's ``ram``; with ``r`` its ``ramplus_tl``: what one model alone changed is multiplied with
    ``1 + r * min(s / u, alpha)``, where s and u are the numbers of its elements that are shared, and that are its own.

    Attributes
    ----------
    epsilon
        Smaller deltas are none.
    """

    r: float = 0.0
    alpha: float = 0.2
    epsilon: float = 1e-5

    @property
    def label(self) -> str:
        """``ram``, ``ram plus 0.1 0.2``."""
        words = f"ram plus {self.r} {self.alpha}" if self.r else "ram"
        return f"{words} epsilon {self.epsilon}"

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the bytes of one part of all inputs, of its buffers and masks."""
        if not self.r:
            return 0
        part = sum(meta.dtype.itemsize for meta in inputs) + room_bytes(inputs) + len(inputs) + 1
        return PART * part + CALL_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns what is each model's own is multiplied with; reads all inputs once where that is not 1."""
        if not self.r:
            return (1.0,) * (len(inputs) - 1)
        own, shared = [0] * (len(inputs) - 1), [0] * (len(inputs) - 1)
        for start, room, models, count in read_deltas(inputs):
            masks = [self._changed(room.less_base(model.read(start, count)), room) for model in models]
            times = np.sum(masks, axis=0, dtype=np.uint8)
            for index, mask in enumerate(masks):
                whole = int(np.count_nonzero(mask))
                alone = int(np.count_nonzero(mask[times == 1]))
                own[index] += alone
                shared[index] += whole - alone
        shares = (both / max(alone, self.epsilon) for both, alone in zip(shared, own, strict=True))
        return tuple(1 + self.r * min(max(share, 0.0), self.alpha) for share in shares)

    def _changed(self, delta: Array, room: Room) -> Array:
        np.abs(delta, out=room.term)
        changed: Array = np.greater(room.term, delta.dtype.type(self.epsilon))
        return changed

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part's buffers and of masks."""
        return Merge.peak(self, inputs, count) + min(count, PART) * (len(inputs) + 3)

    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        del start
        assert isinstance(state, tuple)
        masks = [self._changed(room.less_base(model), room) for model in models]
        times = np.sum(masks, axis=0, dtype=np.uint8)
        alone = np.equal(times, 1)
        np.maximum(times, 1, out=room.divisor, dtype=out.dtype, casting="unsafe")
        out[...] = 0
        for model, mask, more in zip(models, masks, state, strict=True):
            found = room.less_base(model)
            np.multiply(found, mask, out=found)
            np.divide(found, room.divisor, out=found)
            if more != 1:
                np.multiply(alone, out.dtype.type(more - 1), out=room.term)
                np.add(room.term, 1, out=room.term)
                np.multiply(found, room.term, out=found)
            np.add(out, found, out=out)
        np.add(room.base, out, out=out)


KINDS = (
    OpKind(
        name="sce",
        about="SCE merging (Wan et al., 2024): keeps the elements in which the models vary most, weights every model "
        "by how much it changed, and omits deltas that differ from the common sign. mergekit's `sce`.",
        example='x.weight: {op: sce, base: "src:base.weight", of: ["src:a.weight", "src:b.weight"], select_topk: 0.5}',
        params=(Param("select_topk", "number", "The fraction of the varying elements to keep, from 0 to 1.", 1),),
        build=lambda values: Sce(_share(number(values, "select_topk"))),
        terms=("base",),
        many=True,
        lossy="the models of a merge are not known",
    ),
    OpKind(
        name="ram",
        about="Reinforced agent merging (2026): averages elements that several models changed, and keeps those that "
        "only one changed. mergekit's `ram`; with `r: 0.1` its `ramplus_tl`.",
        example='x.weight: {op: ram, base: "src:base.weight", of: ["src:a.weight", "src:b.weight"]}',
        params=(
            Param("r", "number", "Scales up unique changes by the share of common changes. 0.1 in `ramplus_tl`.", 0),
            Param("alpha", "number", "The upper limit of that share.", 0.2),
            Param("epsilon", "number", "Changes up to this size are ignored.", 1e-5),
        ),
        build=lambda values: Ram(*(number(values, key) for key in ("r", "alpha", "epsilon"))),
        terms=("base",),
        many=True,
        lossy="the models of a merge are not known",
    ),
)


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise MappingError("op-value", f"`select_topk` is {value}", expected="from 0 to 1")
    return value
