"""All ops. A family is a module that exports ``KINDS``, and one line here."""

from __future__ import annotations

from shardmerge.ops import casts, fill, heads, moves, pointwise
from shardmerge.ops.contract import OpKind

OPS: dict[str, OpKind] = {kind.name: kind for family in (moves, heads, casts, pointwise, fill) for kind in family.KINDS}
