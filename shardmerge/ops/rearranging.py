"""Moves that keep every element, under another shape or in another order: transpose, permute, reshape, squeeze.

Each says with ``layout`` where the elements of its result lie in its input, and with ``apply`` what that means for
arrays. Axes may be negative, as in torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Meta, Mirror, Move, MoveLayout, OpKind, Param, Shape, Texts, Typed, ViewLayout
from shardmerge.ops.params import DIM, integer, integers, same
from shardmerge.ops.shapes import axis_of, odd_shape, row_major


@dataclass(frozen=True, slots=True)
class Permute(Move):
    """Axes in another order: ``torch.permute``. Empty ``dims`` turn them all around (a matrix is transposed)."""

    dims: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """``permute [1, 0]``, or ``transpose``."""
        return f"permute {list(self.dims)}" if self.dims else "transpose"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``transposed``, ``dims permuted [2, 0, 1]``."""
        del inputs
        return f"dims permuted {list(self.dims)}" if len(self.dims) > 2 else "transposed"

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

    def words(self, inputs: Sequence[Typed]) -> str:
        """``transposed``, ``dims -2 and -1 swapped``."""
        return "transposed" if len(inputs[0].shape) == 2 else f"dims {self.dim0} and {self.dim1} swapped"

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

    def words(self, inputs: Sequence[Typed]) -> str:
        """``reshaped``."""
        del inputs
        return "reshaped"

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


# --- in mapping.yaml ---


def _inverse_permutation(params: Texts) -> Texts:
    """Leaves ``dims`` out where they are no plain numbers: what a formula comes to is not known here."""
    words = [word.strip() for word in params.get("dims", "").strip("[]").split(",") if word.strip()]
    if not all(re.fullmatch("-?[0-9]{1,3}", word) for word in words):
        return {}
    dims = [int(word) % len(words) for word in words]
    if sorted(dims) != list(range(len(dims))):
        return {}
    return {**params, "dims": f"[{', '.join(str(dims.index(axis)) for axis in range(len(dims)))}]"}


KINDS = (
    OpKind(
        name="transpose",
        about="Swaps two axes, by default the last two.",
        example='visual_projection.weight: {op: transpose, of: "src:visual.proj"}',
        params=(Param("dim0", "int", "One axis.", -2), Param("dim1", "int", "The other.", -1)),
        build=lambda values: Transpose(integer(values, "dim0"), integer(values, "dim1")),
        inverse=Mirror("transpose", same),
    ),
    OpKind(
        name="permute",
        about="Reorders the axes, like `torch.permute`.",
        example='conv.weight: {op: permute, of: "src:conv.kernel", dims: [3, 2, 0, 1]}',
        params=(Param("dims", "ints", "The old axes in their new order."),),
        build=lambda values: Permute(integers(values, "dims")),
        inverse=Mirror("permute", _inverse_permutation),
    ),
    OpKind(
        name="reshape",
        about="Changes the shape without changing the elements. One size can be -1.",
        example='cls_token: {op: reshape, of: "src:class_embedding", shape: [1, 1, -1], was: [1024]}',
        params=(
            Param("shape", "ints", "The new shape."),
            Param("was", "ints", "The old shape. Checked; `shardmerge invert` needs it.", optional=True),
        ),
        build=lambda values: Reshape(integers(values, "shape"), integers(values, "was") if "was" in values else None),
        inverse=Mirror("reshape", lambda params: {"shape": params.get("was", ""), "was": params["shape"]}),
    ),
    OpKind(
        name="squeeze",
        about="Removes an axis of size 1.",
        example='class_embedding: {op: squeeze, of: "src:cls_token", dim: 0}',
        params=(DIM,),
        build=lambda values: Squeeze(integer(values, "dim")),
        inverse=Mirror("unsqueeze", same),
    ),
    OpKind(
        name="unsqueeze",
        about="Adds an axis of size 1.",
        example='cls_token: {op: unsqueeze, of: "src:class_embedding", dim: 0}',
        params=(DIM,),
        build=lambda values: Unsqueeze(integer(values, "dim")),
        inverse=Mirror("squeeze", same),
    ),
)
