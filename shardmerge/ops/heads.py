"""Moves inside of attention: grouped query-key-value, and the two orders of rotary embeddings.

Sources of the layouts: Megatron-Core's ``linear_qkv`` and InternLM2's ``wqkv`` hold, group by group, the queries of the
group, its key and its value; Meta's LLaMA rotates neighbouring pairs of a head, Hugging Face its two halves
(``permute`` in transformers' ``convert_llama_weights_to_hf.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

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
    Typed,
    ViewLayout,
)
from shardmerge.ops.params import integers, positive, same, take
from shardmerge.ops.shapes import odd_shape, row_major


@dataclass(frozen=True, slots=True)
class GroupedSplit(Move):
    """Part ``take`` of every group of dim 0, the groups one after the other.

    ``[groups * sum(sizes), ...]`` gives ``[groups * sizes[take], ...]``.
    """

    groups: int
    sizes: tuple[int, ...]
    take: int

    @property
    def label(self) -> str:
        """``grouped split 8 x [512, 128, 128] part 0``."""
        return f"grouped split {self.groups} x {list(self.sizes)} part {self.take}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``split in 3 (8 groups of 512 + 128 + 128 rows)``."""
        del inputs
        return f"split in {len(self.sizes)} ({self.groups} groups of {' + '.join(map(str, self.sizes))} rows)"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape of the part."""
        (one,) = inputs
        rows = self.groups * sum(self.sizes)
        if not one.shape or one.shape[0] != rows:
            what = f"{self.label}: the groups are not those of the tensor"
            raise odd_shape(what, list(one.shape), f"{rows} rows = {self.groups} x {sum(self.sizes)}")
        return Meta(one.dtype, (self.groups * self.sizes[self.take], *one.shape[1:]))

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """Groups ``sum(sizes)`` rows apart, from the part's first row on."""
        (one,) = inputs
        width = prod(one.shape[1:])
        starts = [0, *accumulate(self.sizes)]
        shape = (self.groups, self.sizes[self.take] * width)
        return ViewLayout(starts[self.take] * width, shape, (sum(self.sizes) * width, 1))

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        starts = [0, *accumulate(self.sizes)]
        grouped = inputs[0].reshape(self.groups, sum(self.sizes), *inputs[0].shape[1:])
        part = grouped[:, starts[self.take] : starts[self.take + 1]]
        return part.reshape(-1, *inputs[0].shape[1:])


@dataclass(frozen=True, slots=True)
class GroupedMerge(Move):
    """Group g of the result is group g of every input, in order: the inverse of ``GroupedSplit`` over all its parts."""

    groups: int
    sizes: tuple[int, ...]

    @property
    def label(self) -> str:
        """``grouped merge 8 x [512, 128, 128]``."""
        return f"grouped merge {self.groups} x {list(self.sizes)}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``3 joined (8 groups of 512 + 128 + 128 rows)``."""
        return f"{len(inputs)} joined ({self.groups} groups of {' + '.join(map(str, self.sizes))} rows)"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape with all rows."""
        first = inputs[0]
        found = [other.shape[0] if other.shape else 0 for other in inputs]
        alike = all((other.dtype, other.shape[1:]) == (first.dtype, first.shape[1:]) for other in inputs)
        if not alike or found != [self.groups * size for size in self.sizes]:
            what = f"{self.label}: the tensors do not fit together"
            raise odd_shape(what, [list(other.shape) for other in inputs],
                            f"rows {[self.groups * size for size in self.sizes]} of one type and width")  # fmt: skip
        return Meta(first.dtype, (sum(found), *first.shape[1:]))

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """Side by side, once a group."""
        del inputs
        return ColumnsLayout(self.groups)

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As numpy does."""
        rest = inputs[0].shape[1:]
        return np.concatenate([one.reshape(self.groups, -1, *rest) for one in inputs], axis=1).reshape(-1, *rest)


@dataclass(frozen=True, slots=True)
class Rotary(Move):
    """Rows of each head from pairs to halves (``inverse`` False, Meta to Hugging Face), or back.

    Dim 0 is ``heads * head_dim``; a weight ``[rows, in]``, a bias ``[rows]`` and a LoRA B ``[rows, r]`` go alike.
    """

    heads: int
    inverse: bool

    @property
    def label(self) -> str:
        """``rotary permute 32 heads``."""
        return f"rotary {'unpermute' if self.inverse else 'permute'} {self.heads} heads"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``rotary rows reordered (32 heads)``."""
        del inputs
        return f"rotary rows reordered ({self.heads} heads)"

    def _box(self, rows: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns shape and strides of ``[heads, pairs or halves, ...]``, the two axes swapped."""
        half = rows // self.heads // 2
        inner = (2, half, width) if self.inverse else (half, 2, width)
        strides = row_major((self.heads, *inner))
        return (self.heads, inner[1], inner[0], width), (strides[0], strides[2], strides[1], 1)

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the input's own shape."""
        (one,) = inputs
        if not one.shape or one.shape[0] % (2 * self.heads):
            what = f"{self.label}: the rows are not heads of an even size"
            raise odd_shape(what, list(one.shape), f"a multiple of {2 * self.heads} rows")
        return one

    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """One box, two of its axes swapped."""
        (one,) = inputs
        return ViewLayout(0, *self._box(one.shape[0], prod(one.shape[1:])))

    def apply(self, inputs: Sequence[Array]) -> Array:
        """As transformers' ``permute`` does."""
        (one,) = inputs
        half = one.shape[0] // self.heads // 2
        inner = (2, half) if self.inverse else (half, 2)
        return one.reshape(self.heads, *inner, *one.shape[1:]).swapaxes(1, 2).reshape(one.shape)


def _grouped_split(values: Mapping[str, ParamValue]) -> GroupedSplit:
    (groups,) = positive(values, "groups")
    sizes = _sizes(values)
    return GroupedSplit(groups, sizes, take(values, len(sizes)))


def _grouped_merge(values: Mapping[str, ParamValue]) -> GroupedMerge:
    (groups,) = positive(values, "groups")
    return GroupedMerge(groups, _sizes(values))


def _sizes(values: Mapping[str, ParamValue]) -> tuple[int, ...]:
    sizes = integers(values, "sizes")
    if min(sizes, default=0) < 1:
        raise MappingError("op-value", f"`sizes` is {list(sizes)}", expected="a list of positive sizes")
    return sizes


_GROUPS = Param("groups", "int", "The number of groups, that is of key-value heads.")
_SIZES = Param("sizes", "ints", "Rows of each part in one group, e.g. `[heads // kv_heads * head_dim, head_dim, ...]`.")
_HEADS = Param("heads", "int", "The number of heads: query heads for q, key-value heads for k.")

KINDS = (
    OpKind(
        name="grouped_split",
        about="Takes one part of every group of rows: q, k or v of a fused weight that is stored group by group "
        "(Megatron-Core, InternLM2).",
        example='k.weight: {op: grouped_split, of: "src:grouped_qkv.weight", groups: 2, sizes: [4, 2, 2], take: 1}',
        params=(_GROUPS, _SIZES, Param("take", "int", "Which part, counted from 0.")),
        build=_grouped_split,
        inverse=Gathered("grouped_merge"),
    ),
    OpKind(
        name="grouped_merge",
        about="Fuses tensors group by group; the inverse of `grouped_split`.",
        example="qkv.weight: {op: grouped_merge, groups: 2, sizes: [4, 2, 2], "
        'of: ["src:q.weight", "src:k.weight", "src:v.weight"]}',
        params=(_GROUPS, _SIZES),
        build=_grouped_merge,
        many=True,
        inverse=Scattered("grouped_split", "sizes"),
    ),
    OpKind(
        name="rotary_permute",
        about="Reorders the rows of every head from Meta's order (adjacent pairs are rotated) to Hugging Face's "
        "(the two halves are rotated). For q and k: weight, bias and LoRA B; never for v.",
        example='q_proj.weight: {op: rotary_permute, of: "src:wq.weight", heads: 4}',
        params=(_HEADS,),
        build=lambda values: Rotary(positive(values, "heads")[0], inverse=False),
        inverse=Mirror("rotary_unpermute", same),
    ),
    OpKind(
        name="rotary_unpermute",
        about="Reorders the rows of every head from Hugging Face's order to Meta's; the inverse of `rotary_permute`.",
        example='wq.weight: {op: rotary_unpermute, of: "src:q.weight", heads: 4}',
        params=(_HEADS,),
        build=lambda values: Rotary(positive(values, "heads")[0], inverse=True),
        inverse=Mirror("rotary_permute", same),
    ),
)
