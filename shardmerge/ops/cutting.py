"""Moves that take a part of one axis: slice, split, chunk, unstack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Gathered, Meta, Move, MoveLayout, OpKind, Param, Shape, Typed, ViewLayout
from shardmerge.ops.params import DIM, TAKE, ParamValues, integer, integers, positive, take
from shardmerge.ops.shapes import axis_of, axis_word, odd_shape, row_major


@dataclass(frozen=True, slots=True)
class Slice(Move):
    """Elements ``[start, stop)`` of one axis; ``stop`` None is its end. Negative values count from the end."""

    dim: int
    start: int
    stop: int | None

    @property
    def label(self) -> str:
        """``slice dim 0 [0:32000]``."""
        return f"slice dim {self.dim} [{self.start}:{'' if self.stop is None else self.stop}]"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``first 32000 of 32064 rows``, ``rows 4096:5120 of 6144``."""
        (one,) = inputs
        size = one.shape[self.dim]
        start, stop, _ = slice(self.start, self.stop).indices(size)
        word = axis_word(self.dim, len(one.shape))
        return f"{word} {start}:{stop} of {size}" if start else f"first {stop} of {size} {word}"

    def _bounds(self, shape: Shape) -> tuple[int, int, int]:
        """Returns axis, start and stop, inside of the shape."""
        axis = axis_of(self.dim, len(shape), self.label)
        size = shape[axis]
        start = self.start + size if self.start < 0 else self.start
        stop = size if self.stop is None else self.stop + size if self.stop < 0 else self.stop
        if not 0 <= start <= stop <= size:
            raise odd_shape(f"{self.label} reaches outside of the tensor", list(shape), f"at most {size} at dim {axis}")
        return axis, start, stop

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape with the axis cut."""
        (one,) = inputs
        axis, start, stop = self._bounds(one.shape)
        return Meta(one.dtype, (*one.shape[:axis], stop - start, *one.shape[axis + 1 :]))

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """The same strides from a later element on."""
        (one,) = inputs
        axis, start, _ = self._bounds(one.shape)
        strides = row_major(one.shape)
        return ViewLayout(start * strides[axis], self.infer(inputs).shape, strides)

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        axis, start, stop = self._bounds(inputs[0].shape)
        return inputs[0][(slice(None),) * axis + (slice(start, stop),)]


class _Part(Move):
    """A slice whose bounds follow from the shape."""

    __slots__ = ()

    @abstractmethod
    def _slice(self, shape: Shape) -> Slice:
        """Returns the slice that takes the part out of a tensor of this shape."""

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape of the part."""
        return self._slice(inputs[0].shape).infer(inputs)

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """That of the slice."""
        return self._slice(inputs[0].shape).layout(inputs)

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        return self._slice(inputs[0].shape).apply(inputs)


@dataclass(frozen=True, slots=True)
class Split(_Part):
    """Part ``take`` of an axis that is divided into ``sizes``, which must add up to the whole axis."""

    dim: int
    sizes: tuple[int, ...]
    take: int

    @property
    def label(self) -> str:
        """``split dim 0 [4096, 1024, 1024] part 0``."""
        return f"split dim {self.dim} {list(self.sizes)} part {self.take}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``split in 3 (4096 + 1024 + 1024 rows)``."""
        word = axis_word(self.dim, len(inputs[0].shape))
        return f"split in {len(self.sizes)} ({' + '.join(map(str, self.sizes))} {word})"

    def _slice(self, shape: Shape) -> Slice:
        axis = axis_of(self.dim, len(shape), self.label)
        if sum(self.sizes) != shape[axis]:
            raise odd_shape(
                f"{self.label}: the sizes are not those of the tensor",
                f"{list(shape)}, {shape[axis]} at dim {axis}",
                f"{sum(self.sizes)} at dim {axis}",
            )
        starts = [0, *accumulate(self.sizes)]
        return Slice(axis, starts[self.take], starts[self.take + 1])


@dataclass(frozen=True, slots=True)
class Chunk(_Part):
    """Part ``take`` of an axis divided into ``chunks`` equal parts."""

    dim: int
    chunks: int
    take: int

    @property
    def label(self) -> str:
        """``chunk dim 0 part 0 of 3``."""
        return f"chunk dim {self.dim} part {self.take} of {self.chunks}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``split in 3 equal parts (rows)``."""
        return f"split in {self.chunks} equal parts ({axis_word(self.dim, len(inputs[0].shape))})"

    def _slice(self, shape: Shape) -> Slice:
        axis = axis_of(self.dim, len(shape), self.label)
        if shape[axis] % self.chunks:
            what = f"{self.label}: the parts would not be equal"
            raise odd_shape(what, list(shape), f"a multiple of {self.chunks} at dim {axis}")
        size = shape[axis] // self.chunks
        return Slice(axis, self.take * size, (self.take + 1) * size)


@dataclass(frozen=True, slots=True)
class Unstack(Move):
    """Element ``take`` of an axis of ``count``; the axis goes."""

    dim: int
    count: int
    take: int

    @property
    def label(self) -> str:
        """``unstack dim 0 part 3 of 80``."""
        return f"unstack dim {self.dim} part {self.take} of {self.count}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``unstacked from 80``."""
        del inputs
        return f"unstacked from {self.count}"

    def _axis(self, shape: Shape) -> int:
        axis = axis_of(self.dim, len(shape), self.label)
        if shape[axis] != self.count:
            what = f"{self.label}: another number is stacked"
            raise odd_shape(what, f"{list(shape)}, {shape[axis]} at dim {axis}", f"{self.count} at dim {axis}")
        return axis

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape without the axis."""
        (one,) = inputs
        axis = self._axis(one.shape)
        return Meta(one.dtype, one.shape[:axis] + one.shape[axis + 1 :])

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """The other axes' strides from a later element on."""
        (one,) = inputs
        axis, strides = self._axis(one.shape), row_major(one.shape)
        return ViewLayout(self.take * strides[axis], self.infer(inputs).shape, strides[:axis] + strides[axis + 1 :])

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        axis = self._axis(inputs[0].shape)
        return inputs[0][(slice(None),) * axis + (slice(self.take, self.take + 1),)].squeeze(axis)


# --- in mapping.yaml ---


def _split(values: ParamValues) -> Split:
    sizes = integers(values, "sizes")
    if min(sizes, default=-1) < 0:
        raise MappingError("op-value", f"`sizes` is {list(sizes)}", expected="a list of sizes that add up to the axis")
    return Split(integer(values, "dim"), sizes, take(values, len(sizes)))


def _chunk(values: ParamValues) -> Chunk:
    (chunks,) = positive(values, "chunks")
    return Chunk(integer(values, "dim"), chunks, take(values, chunks))


def _unstack(values: ParamValues) -> Unstack:
    (count,) = positive(values, "count")
    return Unstack(integer(values, "dim"), count, take(values, count))


def _slice(values: ParamValues) -> Slice:
    stop = integer(values, "stop") if "stop" in values else None
    return Slice(integer(values, "dim"), integer(values, "start"), stop)


KINDS = (
    OpKind(
        name="slice",
        about="Takes a range of one axis.",
        example='embed.weight: {op: slice, of: "src:embed.weight", dim: 0, stop: 32000}',
        params=(
            DIM,
            Param("start", "int", "First index.", 0),
            Param("stop", "int", "One past the last index. Default: the end of the axis.", optional=True),
        ),
        build=_slice,
        lossy="what was cut off is gone",
    ),
    OpKind(
        name="split",
        about="Takes one part of an axis that is divided into parts of given sizes. The sizes must add up to the axis, "
        "so that a wrong head count is an error.",
        example='q_proj.weight: {op: split, of: "src:qkv.weight", dim: 0, sizes: [8, 4, 4], take: 0}',
        params=(DIM, Param("sizes", "ints", "The sizes of all parts."), TAKE),
        build=_split,
        inverse=Gathered("concat"),
    ),
    OpKind(
        name="chunk",
        about="Takes one of several equal parts of an axis.",
        example='gate_proj.weight: {op: chunk, of: "src:gate_up.weight", dim: 0, chunks: 2, take: 0}',
        params=(DIM, Param("chunks", "int", "The number of parts."), TAKE),
        build=_chunk,
        inverse=Gathered("concat"),
    ),
    OpKind(
        name="unstack",
        about="Takes one of the tensors that are stacked along an axis: a layer, an expert. The axis is removed.",
        example='layers.1.o_proj.weight: {op: unstack, of: "src:layers.o_proj.weight", count: 3, take: 1}',
        params=(DIM, Param("count", "int", "The number of stacked tensors. A different number is an error."), TAKE),
        build=_unstack,
        inverse=Gathered("stack"),
    ),
)
