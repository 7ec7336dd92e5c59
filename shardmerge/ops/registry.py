"""All ops. A family is a module that exports ``KINDS``, and one line here."""

from __future__ import annotations

from shardmerge.ops import casts, fill, heads, merging, moves, pointwise, spherical
from shardmerge.ops.contract import OpKind

_FAMILIES = (moves, heads, casts, pointwise, fill, merging, spherical)

OPS: dict[str, OpKind] = {kind.name: kind for family in _FAMILIES for kind in family.KINDS}
