"""All ops that merge models."""

from __future__ import annotations

from shardmerge.ops import agreement, merging_kinds, spherical, stock, swapping

KINDS = (*merging_kinds.KINDS, *spherical.KINDS, *stock.KINDS, *swapping.KINDS, *agreement.KINDS)
