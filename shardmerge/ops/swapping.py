"""Two models, of which the result takes the one or the other element by element: nearswap, Arcee fusion."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Meta, OpKind, Param, State, Stream
from shardmerge.ops.deltas import InRows, Merge, Room
from shardmerge.ops.parts import CALL_BYTES, PART, parts, rows_of_part
from shardmerge.ops.pointwise import number
from shardmerge.ops.selection import ordered_keys, select_peak, thresholds, value_of
from shardmerge.ops.shapes import odd_shape
from shardmerge.ops.softmax import SOFTMAX_BYTES, divergences

# mergekit's: the least difference that is divided by, and what is added to probabilities.
_LEAST, _EPSILON = 1e-6, 1e-8


class _OfTwo(Merge):
    """A base and one model."""

    __slots__ = ()

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        if len(inputs) != 2:
            raise odd_shape(f"{self.label}: of how many tensors?", len(inputs), "a base and 1 model")
        return Merge.infer(self, inputs)


@dataclass(frozen=True, slots=True)
class NearSwap(_OfTwo):
    """The base, drawn to the model where they are near: mergekit's ``nearswap``.

    ``w * model + (1 - w) * base`` with ``w = min(t / |base - model|, 1)``, differences below 1e-6 counting as that.
    """

    t: float

    @property
    def label(self) -> str:
        """``nearswap 0.0001``."""
        return f"nearswap {self.t}"

    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        del state, start
        (model,) = models
        np.abs(room.less_base(model), out=room.term)
        np.maximum(room.term, out.dtype.type(_LEAST), out=room.term)
        np.divide(out.dtype.type(self.t), room.term, out=room.term)
        np.clip(room.term, 0, 1, out=room.term)
        np.copyto(room.delta, model, casting="unsafe")
        np.multiply(room.delta, room.term, out=out)
        np.subtract(1, room.term, out=room.term)
        np.multiply(room.base, room.term, out=room.delta)
        np.add(out, room.delta, out=out)


@dataclass(frozen=True, slots=True)
class _Fused(InRows):
    """Importance from which on the model is taken."""

    threshold: float = 0.0


# Elements whose softmax is made at once.
_ROWS = 1 << 14


@dataclass(frozen=True, slots=True)
class ArceeFusion(_OfTwo):
    """The model where its changes are important, the base elsewhere: mergekit's ``arcee_fusion``.

    The importance of an element is its change times the divergence of the softmax of its row (last axis) from that of
    the base. Important are those from the median plus 1.5 times the distance of the quartiles on, all exact: mergekit
    draws a million elements at random where there are more. Found in float64 and compared in float32.
    """

    @property
    def label(self) -> str:
        """``arcee fusion``."""
        return "arcee fusion"

    def unit(self, inputs: Sequence[Meta]) -> int:
        """Returns the length of a row."""
        return max(inputs[0].shape[-1], 1) if inputs[0].shape else 1

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the bytes of rows of both, of what their importance takes, and of three histograms."""
        step = rows_of_part(self.unit(inputs), _ROWS)
        return step * (sum(meta.dtype.itemsize for meta in inputs) + SOFTMAX_BYTES + 24) + select_peak(3) + CALL_BYTES

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part's buffers and of what importance takes."""
        rows = rows_of_part(self.unit(inputs), _ROWS)
        part = min(count, self.step(inputs))
        return Merge.peak(self, inputs, count) + part * 4 + min(count, rows) * (SOFTMAX_BYTES + 24)

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns the threshold; reads both twice."""
        row, numel = self.unit([one.meta for one in inputs]), prod(inputs[0].meta.shape)
        if not numel:
            return _Fused(row)
        # Ascending places of the quartiles, as torch indexes the sorted tensor.
        places = [int(share * (numel - 1)) for share in (0.25, 0.5, 0.75)]
        found = thresholds(lambda wanted: _keys(inputs, row, wanted), [numel - place for place in places], numel)
        low, median, high = (value_of(one.key) for one in found)
        return _Fused(row, median + 1.5 * (high - low))

    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        del start
        assert isinstance(state, _Fused)
        (model,) = models
        mask = np.empty(len(out), np.bool_)
        for rows in parts(len(out), rows_of_part(state.row, _ROWS)):
            np.greater_equal(_importance(model[rows], room.base[rows], state.row), state.threshold, out=mask[rows])
        np.multiply(room.less_base(model), mask, out=out)
        np.add(room.base, out, out=out)


def _importance(model: Array, base: Array, row: int) -> Array:
    """Returns the importance of the elements of whole rows, rounded to float32."""
    wide, root = (np.asarray(one, np.float64).reshape(-1, row) for one in (model, base))
    far = divergences(wide, root, _EPSILON)[:, None]
    change = np.abs(np.subtract(wide, root, out=wide), out=wide)
    return np.multiply(change, far, out=wide).astype(np.float32).reshape(-1)


def _keys(inputs: Sequence[Stream], row: int, wanted: Collection[int]) -> Iterator[tuple[int, int, Array]]:
    """Yields the keys of all elements, once for every quartile, in blocks of at most ``PART``."""
    base, model = inputs
    with np.errstate(all="ignore"):
        for rows in parts(prod(base.meta.shape), rows_of_part(row, _ROWS)):
            start, count = rows.start, rows.stop - rows.start
            keys = ordered_keys(_importance(model.read(start, count), base.read(start, count), row))
            for part in parts(count, PART):
                yield from ((start + part.start, index, keys[part]) for index in sorted(wanted))


KINDS = (
    OpKind(
        name="nearswap",
        about="Moves a base towards another model where the two are close: elements that differ by at most `t` are "
        "those of the model; the larger the difference, the closer to the base. mergekit's `nearswap`.",
        example='x.weight: {op: nearswap, base: "src:base.weight", of: ["src:a.weight"], t: 1}',
        params=(Param("t", "number", "The difference up to which the model's element is taken."),),
        build=lambda values: NearSwap(number(values, "t")),
        terms=("base",),
        many=True,
        lossy="the models of a merge are not known",
    ),
    OpKind(
        name="arcee_fusion",
        about="Takes the elements whose change from the base is important from a model, and all others from the base. "
        "Importance depends on the size of the change and on how far its row moved. mergekit's `arcee_fusion`, with "
        "exact quartiles for every size.",
        example='x.weight: {op: arcee_fusion, base: "src:base.weight", of: ["src:a.weight"]}',
        params=(),
        build=lambda _: ArceeFusion(),
        terms=("base",),
        many=True,
        lossy="the models of a merge are not known",
    ),
)
