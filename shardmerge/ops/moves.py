"""Moves: transpose, permute, reshape, squeeze, slice, split, chunk, concat, stack.

Each says with ``layout`` where the elements of its result lie in its inputs, and with ``apply`` what that means for
arrays. Sizes are in elements, axes may be negative, as in torch.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TypeAlias

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import (
    ColumnsLayout,
    Gathered,
    Meta,
    Mirror,
    Move,
    MoveLayout,
    OpKind,
    Param,
    ParamValue,
    Scattered,
    Shape,
    Texts,
    ViewLayout,
)

_Values: TypeAlias = Mapping[str, ParamValue]


def row_major(shape: Shape) -> tuple[int, ...]:
    """Returns the strides of a dense tensor, in elements."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def odd_shape(what: str, found: object, expected: str) -> MappingError:
    """Returns the error of an input that an op cannot take."""
    return MappingError("op-shape", what, found=str(found), expected=expected)


def axis_of(dim: int, rank: int, what: str) -> int:
    """Returns a non-negative axis."""
    if not -rank <= dim < rank:
        raise odd_shape(f"{what}: there is no dim {dim}", f"{rank} dimensions", f"a dim from {-rank} to {rank - 1}")
    return dim % rank


@dataclass(frozen=True, slots=True)
class Permute(Move):
    """Axes in another order: ``torch.permute``. Empty ``dims`` turn them all around (a matrix is transposed)."""

    dims: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """``permute [1, 0]``, or ``transpose``."""
        return f"permute {list(self.dims)}" if self.dims else "transpose"

    def _order(self, rank: int) -> tuple[int, ...]:
        dims = self.dims or tuple(range(rank))[::-1]
        order = tuple(axis_of(dim, rank, self.label) for dim in dims)
        if sorted(order) != list(range(rank)):
            raise odd_shape(f"{self.label}: not every dim once", f"{rank} dimensions", f"{rank} different dims")
        return order

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the permuted shape."""
        (one,) = inputs
        return Meta(one.dtype, tuple(one.shape[axis] for axis in self._order(len(one.shape))))

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """The strides, permuted alike."""
        (one,) = inputs
        strides, order = row_major(one.shape), self._order(len(one.shape))
        return ViewLayout(0, tuple(one.shape[axis] for axis in order), tuple(strides[axis] for axis in order))

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        return inputs[0].transpose(self._order(inputs[0].ndim))


@dataclass(frozen=True, slots=True)
class Transpose(Move):
    """Two axes swapped: ``torch.transpose``."""

    dim0: int = -2
    dim1: int = -1

    @property
    def label(self) -> str:
        """``transpose -2 -1``."""
        return f"transpose {self.dim0} {self.dim1}"

    def _permute(self, rank: int) -> Permute:
        order = list(range(rank))
        a, b = axis_of(self.dim0, rank, self.label), axis_of(self.dim1, rank, self.label)
        order[a], order[b] = order[b], order[a]
        return Permute(tuple(order))

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape with the two axes swapped."""
        return self._permute(len(inputs[0].shape)).infer(inputs)

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """The strides, swapped alike."""
        return self._permute(len(inputs[0].shape)).layout(inputs)

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        return inputs[0].swapaxes(self.dim0, self.dim1)


class _InOrder(Move):
    """All elements of the input in their order, under another shape."""

    __slots__ = ()

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """All elements in their order."""
        return ViewLayout(0, inputs[0].shape, row_major(inputs[0].shape))


@dataclass(frozen=True, slots=True)
class Reshape(_InOrder):
    """Another shape for the same elements; one size may be -1.

    Attributes
    ----------
    shape
        The new one.
    was
        What the old one must be, one size -1 for any; None for whatever it is.
    """

    shape: Shape
    was: Shape | None = None

    @property
    def label(self) -> str:
        """``reshape [1, 1, 1024]``."""
        return f"reshape {list(self.shape)}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape, -1 filled in."""
        (one,) = inputs
        if self.was is not None and not _is_shape(one.shape, self.was):
            raise odd_shape(f"{self.label}: `was` is not the tensor's shape", list(one.shape), str(list(self.was)))
        known, numel = prod(size for size in self.shape if size != -1), prod(one.shape)
        fits = numel == known if -1 not in self.shape else known > 0 and numel % known == 0
        if not fits or self.shape.count(-1) > 1 or min(self.shape, default=0) < -1:
            raise odd_shape(f"{self.label} does not hold the tensor", list(one.shape), f"{numel} elements")
        return Meta(one.dtype, tuple(numel // known if size == -1 else size for size in self.shape))

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        return inputs[0].reshape(self.shape)


def _is_shape(shape: Shape, said: Shape) -> bool:
    pairs = zip(shape, said, strict=False)
    return len(shape) == len(said) and said.count(-1) <= 1 and all(want in (-1, size) for size, want in pairs)


@dataclass(frozen=True, slots=True)
class Squeeze(_InOrder):
    """An axis of size 1 goes."""

    dim: int

    @property
    def label(self) -> str:
        """``squeeze 0``."""
        return f"squeeze {self.dim}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape without the axis."""
        (one,) = inputs
        axis = axis_of(self.dim, len(one.shape), self.label)
        if one.shape[axis] != 1:
            raise odd_shape(f"{self.label}: that dim is not of size 1", list(one.shape), f"size 1 at dim {axis}")
        return Meta(one.dtype, one.shape[:axis] + one.shape[axis + 1 :])

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        return inputs[0].squeeze(self.dim)


@dataclass(frozen=True, slots=True)
class Unsqueeze(_InOrder):
    """A new axis of size 1 at ``dim``."""

    dim: int

    @property
    def label(self) -> str:
        """``unsqueeze 0``."""
        return f"unsqueeze {self.dim}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape with the axis."""
        (one,) = inputs
        axis = axis_of(self.dim, len(one.shape) + 1, self.label)
        return Meta(one.dtype, (*one.shape[:axis], 1, *one.shape[axis:]))

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        return np.expand_dims(inputs[0], self.dim)


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

    def _slice(self, shape: Shape) -> Slice:
        axis = axis_of(self.dim, len(shape), self.label)
        if shape[axis] % self.chunks:
            what = f"{self.label}: the parts would not be equal"
            raise odd_shape(what, list(shape), f"a multiple of {self.chunks} at dim {axis}")
        size = shape[axis] // self.chunks
        return Slice(axis, self.take * size, (self.take + 1) * size)


@dataclass(frozen=True, slots=True)
class Concat(Move):
    """Tensors one after the other along an axis.

    Attributes
    ----------
    dim
        The axis.
    sizes
        What they must measure along it; empty for whatever they do.
    chunks
        How many of equal size there must be; 0 for any.
    """

    dim: int = 0
    sizes: tuple[int, ...] = ()
    chunks: int = 0

    @property
    def label(self) -> str:
        """``concat dim 0``."""
        return f"concat dim {self.dim}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the common shape with the axis added up."""
        first = inputs[0]
        axis = axis_of(self.dim, len(first.shape), self.label)
        for other in inputs:
            around = (*other.shape[:axis], *other.shape[axis + 1 :])
            if other.dtype != first.dtype or around != (*first.shape[:axis], *first.shape[axis + 1 :]):
                what = f"{self.label}: the tensors do not fit together"
                raise odd_shape(what, f"{first.dtype} {list(first.shape)} and {other.dtype} {list(other.shape)}",
                                f"one type, and equal sizes but at dim {axis}")  # fmt: skip
        found = tuple(other.shape[axis] for other in inputs)
        if self.sizes and found != self.sizes:
            raise odd_shape(f"{self.label}: the sizes are not those given", list(found), str(list(self.sizes)))
        if self.chunks and (len(found) != self.chunks or len(set(found)) > 1):
            wanted = f"{self.chunks} of equal size, as `chunks` says"
            raise odd_shape(f"{self.label}: the tensors are not those chunks", list(found), wanted)
        return Meta(first.dtype, (*first.shape[:axis], sum(found), *first.shape[axis + 1 :]))

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """Side by side, once for every index of the axes in front."""
        shape = inputs[0].shape
        return ColumnsLayout(prod(shape[: axis_of(self.dim, len(shape), self.label)]))

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        return np.concatenate(inputs, self.dim)


@dataclass(frozen=True, slots=True)
class Stack(Move):
    """Tensors of one shape along a new axis."""

    dim: int = 0

    @property
    def label(self) -> str:
        """``stack dim 0``."""
        return f"stack dim {self.dim}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the common shape with an axis as long as there are tensors."""
        first = inputs[0]
        axis = axis_of(self.dim, len(first.shape) + 1, self.label)
        odd = next((other for other in inputs if other != first), None)
        if odd is not None:
            found = f"{first.dtype} {list(first.shape)} and {odd.dtype} {list(odd.shape)}"
            raise odd_shape(f"{self.label}: the tensors are not alike", found, "one type and shape")
        return Meta(first.dtype, (*first.shape[:axis], len(inputs), *first.shape[axis:]))

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """Side by side, once for every index of the axes in front."""
        shape = inputs[0].shape
        return ColumnsLayout(prod(shape[: axis_of(self.dim, len(shape) + 1, self.label)]))

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        return np.stack(inputs, self.dim)


# --- in mapping.yaml ---


def integer(values: _Values, key: str) -> int:
    """Returns an integer parameter."""
    value = values[key]
    assert isinstance(value, int)  # the reader of the mapping made sure
    return value


def integers(values: _Values, key: str) -> tuple[int, ...]:
    """Returns a parameter that is a list of integers."""
    value = values.get(key, ())
    assert isinstance(value, tuple)
    return tuple(int(item) for item in value)


def take(values: _Values, parts: int) -> int:
    """Returns ``take``, which must be one of so many parts."""
    found = integer(values, "take")
    if not 0 <= found < parts:
        raise MappingError(
            "op-value", f"`take: {found}` is not one of {parts} parts", expected=f"0 to {parts - 1}",
            hint=f"write `take: {parts - 1}` for the last part: the first is 0",
        )  # fmt: skip
    return found


def positive(values: _Values, *keys: str) -> tuple[int, ...]:
    """Returns integer parameters that must be at least 1."""
    found = tuple(integer(values, key) for key in keys)
    for key, value in zip(keys, found, strict=True):
        if value < 1:
            raise MappingError("op-value", f"`{key}` is {value}", expected="at least 1")
    return found


def same(params: Texts) -> Texts:
    """Undone with the same parameters."""
    return params


def _split(values: _Values) -> Split:
    sizes = integers(values, "sizes")
    if min(sizes, default=-1) < 0:
        raise MappingError("op-value", f"`sizes` is {list(sizes)}", expected="a list of sizes that add up to the axis")
    return Split(integer(values, "dim"), sizes, take(values, len(sizes)))


def _chunk(values: _Values) -> Chunk:
    (chunks,) = positive(values, "chunks")
    return Chunk(integer(values, "dim"), chunks, take(values, chunks))


def _concat(values: _Values) -> Concat:
    chunks = positive(values, "chunks")[0] if "chunks" in values else 0
    return Concat(integer(values, "dim"), integers(values, "sizes"), chunks)


def _slice(values: _Values) -> Slice:
    stop = integer(values, "stop") if "stop" in values else None
    return Slice(integer(values, "dim"), integer(values, "start"), stop)


def _inverse_permutation(params: Texts) -> Texts:
    """Leaves ``dims`` out where they are no plain numbers: what a formula comes to is not known here."""
    words = [word.strip() for word in params.get("dims", "").strip("[]").split(",") if word.strip()]
    if not all(re.fullmatch("-?[0-9]{1,3}", word) for word in words):
        return {}
    dims = [int(word) % len(words) for word in words]
    if sorted(dims) != list(range(len(dims))):
        return {}
    return {**params, "dims": f"[{', '.join(str(dims.index(axis)) for axis in range(len(dims)))}]"}


_DIM = Param("dim", "int", "The axis, counted from 0, or from the end with a minus.", 0)
_TAKE = Param("take", "int", "Which part, counted from 0.")

KINDS = (
    OpKind(
        name="transpose",
        about="Swaps two axes, the last two where nothing is said.",
        example='visual_projection.weight: {op: transpose, of: "src:visual.proj"}',
        params=(Param("dim0", "int", "One axis.", -2), Param("dim1", "int", "The other.", -1)),
        build=lambda values: Transpose(integer(values, "dim0"), integer(values, "dim1")),
        inverse=Mirror("transpose", same),
    ),
    OpKind(
        name="permute",
        about="Puts the axes in another order, as `torch.permute`.",
        example='conv.weight: {op: permute, of: "src:conv.kernel", dims: [3, 2, 0, 1]}',
        params=(Param("dims", "ints", "Old axes in their new order."),),
        build=lambda values: Permute(integers(values, "dims")),
        inverse=Mirror("permute", _inverse_permutation),
    ),
    OpKind(
        name="reshape",
        about="Gives the same elements another shape. One size may be -1.",
        example='cls_token: {op: reshape, of: "src:class_embedding", shape: [1, 1, -1], was: [1024]}',
        params=(
            Param("shape", "ints", "The new shape."),
            Param("was", "ints", "The old shape. Checked, and what `shardmerge invert` needs.", optional=True),
        ),
        build=lambda values: Reshape(integers(values, "shape"), integers(values, "was") if "was" in values else None),
        inverse=Mirror("reshape", lambda params: {"shape": params.get("was", ""), "was": params["shape"]}),
    ),
    OpKind(
        name="squeeze",
        about="Removes an axis of size 1.",
        example='class_embedding: {op: squeeze, of: "src:cls_token", dim: 0}',
        params=(_DIM,),
        build=lambda values: Squeeze(integer(values, "dim")),
        inverse=Mirror("unsqueeze", same),
    ),
    OpKind(
        name="unsqueeze",
        about="Adds an axis of size 1.",
        example='cls_token: {op: unsqueeze, of: "src:class_embedding", dim: 0}',
        params=(_DIM,),
        build=lambda values: Unsqueeze(integer(values, "dim")),
        inverse=Mirror("squeeze", same),
    ),
    OpKind(
        name="slice",
        about="Takes a range of one axis.",
        example='embed.weight: {op: slice, of: "src:embed.weight", dim: 0, stop: 32000}',
        params=(
            _DIM,
            Param("start", "int", "First index.", 0),
            Param("stop", "int", "Behind the last index; the end of the axis where absent.", optional=True),
        ),
        build=_slice,
        lossy="what was cut off is gone",
    ),
    OpKind(
        name="split",
        about="Takes one part of an axis that is divided into parts of given sizes. The sizes must add up, so that a "
        "wrong head count is an error and not a shifted tensor.",
        example='q_proj.weight: {op: split, of: "src:qkv.weight", dim: 0, sizes: [8, 4, 4], take: 0}',
        params=(_DIM, Param("sizes", "ints", "The sizes of all parts."), _TAKE),
        build=_split,
        inverse=Gathered("concat"),
    ),
    OpKind(
        name="chunk",
        about="Takes one of several equal parts of an axis.",
        example='gate_proj.weight: {op: chunk, of: "src:gate_up.weight", dim: 0, chunks: 2, take: 0}',
        params=(_DIM, Param("chunks", "int", "Into how many parts."), _TAKE),
        build=_chunk,
        inverse=Gathered("concat"),
    ),
    OpKind(
        name="concat",
        about="Puts tensors one after the other along an axis. A template with `{e*}` stands for all of its "
        "matches, in natural order (ranks, experts).",
        example='qkv.weight: {op: concat, of: ["src:q.weight", "src:k.weight", "src:v.weight"], sizes: [8, 4, 4]}',
        params=(
            _DIM,
            Param("sizes", "ints", "Their sizes along it. Checked, and what `shardmerge invert` needs.", optional=True),
            Param("chunks", "int", "Their number, if they are equal; checked, for `shardmerge invert`.", optional=True),
        ),
        build=_concat,
        many=True,
        inverse=Scattered("split", "sizes"),
    ),
    OpKind(
        name="stack",
        about="Puts tensors of one shape along a new axis. A template with `{e*}` stands for all of its matches.",
        example='experts.weight: {op: stack, of: "src:experts.{e*}.weight", dim: 0}',
        params=(_DIM,),
        build=lambda values: Stack(integer(values, "dim")),
        many=True,
        lossy="how many tensors were stacked is not known",
    ),
)
