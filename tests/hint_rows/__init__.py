"""Mistakes whose hints are followed, by subject, and the hints that no row follows."""

from __future__ import annotations

from tests.following import Row
from tests.hint_rows import (
    adapter_bases,
    adapters,
    checkpoints,
    conversions,
    deepspeed,
    distributed,
    distributed_safetensors,
    faults,
    generations,
    llava,
    mapping,
    mergekit,
    merges,
    models,
    names,
    ops,
    output,
    parallel,
    parts,
    pipelines,
    presets,
    quantized,
    rank_pickles,
    reports,
    targets,
    torch_files,
)
from tests.hint_rows.nothing_to_do import ELSEWHERE, NOTHING_TO_DO, OUT_OF_REACH

_TEXTS = (mapping, mergekit, merges, names, ops, presets, output)
_INPUTS = (
    adapters,
    adapter_bases,
    checkpoints,
    conversions,
    deepspeed,
    distributed,
    distributed_safetensors,
    parallel,
    pipelines,
    quantized,
    rank_pickles,
    torch_files,
)
_RESULTS = (models, targets, llava, generations, faults, parts, reports)
ROWS: list[Row] = [row for module in (*_TEXTS, *_INPUTS, *_RESULTS) for row in module.ROWS]

__all__ = ["ELSEWHERE", "NOTHING_TO_DO", "OUT_OF_REACH", "ROWS"]
