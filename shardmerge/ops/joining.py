"""Moves that put tensors together: concat, stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import ColumnsLayout, Meta, Move, MoveLayout, OpKind, Param, Scattered, Typed
from shardmerge.ops.params import DIM, ParamValues, integer, integers, positive
from shardmerge.ops.shapes import axis_of, axis_word, odd_shape


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

    def words(self, inputs: Sequence[Typed]) -> str:
        """``3 joined (rows)``."""
        return f"{len(inputs)} joined ({axis_word(self.dim, len(inputs[0].shape))})"

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

    def words(self, inputs: Sequence[Typed]) -> str:
        """``8 stacked``."""
        return f"{len(inputs)} stacked"

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


def _concat(values: ParamValues) -> Concat:
    chunks = positive(values, "chunks")[0] if "chunks" in values else 0
    return Concat(integer(values, "dim"), integers(values, "sizes"), chunks)


KINDS = (
    OpKind(
        name="concat",
        about="Concatenates tensors along an axis. A template with `{e*}` stands for all of its matches, in natural "
        "order (ranks, experts).",
        example='qkv.weight: {op: concat, of: ["src:q.weight", "src:k.weight", "src:v.weight"], sizes: [8, 4, 4]}',
        params=(
            DIM,
            Param("sizes", "ints", "Their sizes along the axis. Checked; `shardmerge invert` needs it.", optional=True),
            Param("chunks", "int", "The number of equal sizes. Checked; for `shardmerge invert`.", optional=True),
        ),
        build=_concat,
        many=True,
        inverse=Scattered("split", "sizes"),
    ),
    OpKind(
        name="stack",
        about="Stacks tensors of one shape along a new axis. A template with `{e*}` stands for all of its matches.",
        example='experts.weight: {op: stack, of: "src:experts.{e*}.weight", dim: 0}',
        params=(DIM,),
        build=lambda values: Stack(integer(values, "dim")),
        many=True,
        lossy="how many tensors were stacked is not known",
    ),
)
