"""Mistakes whose hints are followed, by subject, and the hints in which there is nothing to do."""

from __future__ import annotations

from tests.following import Row
from tests.hint_rows import adapters, checkpoints, deepspeed, mapping, models, ops, output, quantized, targets
from tests.hint_rows.nothing_to_do import ELSEWHERE, NOTHING_TO_DO, OUT_OF_REACH

ROWS: list[Row] = [
    row
    for module in (mapping, ops, adapters, deepspeed, checkpoints, quantized, models, targets, output)
    for row in module.ROWS
]

__all__ = ["ELSEWHERE", "NOTHING_TO_DO", "OUT_OF_REACH", "ROWS"]
