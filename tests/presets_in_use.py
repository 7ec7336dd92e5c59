"""Presets on checkpoints: a mapping in a folder of its own, and what it wrote, read by safetensors and torch alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from shardmerge.mapping.reader import parse_spec
from shardmerge.prepare import conversion, preparation
from shardmerge.publish import running
from tests.conftest import GOLDEN

LAYOUTS = GOLDEN / "layouts"

Tensors = dict[str, torch.Tensor]


def use_preset(
    preset: str,
    sources: Mapping[str, Path],
    out: Path,
    let: Mapping[str, float] | None = None,
    *,
    format: str = "safetensors",
    more: Mapping[str, object] | None = None,
) -> Path:
    """Runs a preset and returns ``out``; ``more`` is what else the mapping says."""
    mapping = {
        "shardmerge": 1,
        "sources": {name: str(path) for name, path in sources.items()},
        "output": {"path": str(out), "format": format},
        "use": preset,
        **({"let": dict(let)} if let else {}),
        **(more or {}),
    }
    spec = parse_spec(json.dumps(mapping), "mapping.yaml")
    options = conversion.Options(sync=False)
    running.carry_out(preparation.prepare(spec, out.parent, options).plan, out, options)
    return out


def read_tensors(folder: Path) -> Tensors:
    """Returns the tensors of a folder's safetensors files."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns type and shape by name."""
    return {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}


def compare_bits(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> None:
    """Fails with the names that are missing, left over, of another type or shape, or not the same bit for bit."""
    assert kinds(found) == kinds(truth)
    assert [name for name in truth if not torch.equal(_bits(found[name]), _bits(truth[name]))] == []


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
