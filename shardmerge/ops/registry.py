"""All ops. A family is a module that exports ``KINDS``, and one line here."""

from __future__ import annotations

from shardmerge.ops import casts, dequantize, dora, fill, heads, lora, merging, moves, pointwise, spherical, vocabulary
from shardmerge.ops.contract import OpKind

_FAMILIES = (moves, heads, casts, dequantize, pointwise, fill, vocabulary, lora, dora, merging, spherical)

OPS: dict[str, OpKind] = {kind.name: kind for family in _FAMILIES for kind in family.KINDS}
