"""Presets on checkpoints: a mapping in a folder of its own, and what it wrote, read by safetensors and torch alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardmerge import conversion
from shardmerge.mapping.preset_files import Preset, load_preset
from shardmerge.mapping.spec import parse_spec
from shardmerge.targets.registry import TARGETS
from tests.conftest import GOLDEN

LAYOUTS = GOLDEN / "layouts"

Tensors = dict[str, torch.Tensor]


def usable(name: str) -> Preset:
    """Returns a preset, without its target where no such target is registered."""
    preset = load_preset(name)
    known = preset.target is None or preset.target.name in TARGETS
    return preset if known else replace(preset, target=None)


def _without_target(name: str) -> Preset:
    return replace(load_preset(name), target=None)


def use_preset(
    preset: str,
    sources: Mapping[str, Path],
    out: Path,
    let: Mapping[str, float] | None = None,
    *,
    format: str = "safetensors",
    checked: bool = True,
) -> Path:
    """Runs a preset and returns ``out``; ``checked`` says whether its target has a word in it."""
    mapping = {
        "shardmerge": 1,
        "sources": {name: str(path) for name, path in sources.items()},
        "output": {"path": str(out), "format": format},
        "use": preset,
        **({"let": dict(let)} if let else {}),
    }
    spec = parse_spec(json.dumps(mapping), "mapping.yaml")
    options = conversion.Options(sync=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "load_preset", usable if checked else _without_target)
        prepared = conversion.prepare(spec, out.parent, options)
    conversion.carry_out(prepared, out, options)
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
