"""All ops. A family is a module that exports ``KINDS``, and one line here."""

from __future__ import annotations

from shardmerge.ops import (
    casts,
    cutting,
    dequantize,
    dora,
    extract,
    fill,
    heads,
    joining,
    lora,
    merges,
    pointwise,
    rearranging,
    vocabulary,
)
from shardmerge.ops.contract import OpKind

_FAMILIES = (
    rearranging, cutting, joining, heads, casts, dequantize, pointwise, fill, vocabulary, lora, dora, extract, merges,
)  # fmt: skip

OPS: dict[str, OpKind] = {kind.name: kind for family in _FAMILIES for kind in family.KINDS}
