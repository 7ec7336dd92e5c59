"""A preset that meets another layout names one only where that one reads the names: every golden layout and preset.

The property: each preset of the hint, tried on the same checkpoint, does not say `another-layout` in its turn.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from shardmerge.errors import ShardmergeError
from shardmerge.mapping import preset_files
from shardmerge.mapping.preset_files import list_presets
from shardmerge.mapping.reader import parse_spec
from shardmerge.recognition.other_layouts import foreign_presets, odd_layouts
from shardmerge.sources.opening import open_catalog
from shardmerge.tensors import Catalog
from tests.conftest import GOLDEN
from tests.target_files import catalog

LAYOUTS = GOLDEN / "layouts"
_PRESET = re.compile(r"`([a-z]+/[\w.-]+)`")


def golden() -> dict[str, Catalog]:
    """Every golden layout and what it was made into, XTuner's runs and their bases: one of each set of names."""
    paths: dict[str, Path] = {}
    for case in sorted(LAYOUTS.glob("*/case.json")):
        paths[case.parent.name] = case.parent / json.loads(case.read_text("utf-8"))["entry"]
        paths[f"{case.parent.name}, made"] = case.parent / "truth"
    for folder in sorted((GOLDEN / "xtuner").iterdir()):
        paths[folder.name] = next(iter(folder.glob("*.pth")), folder)
    opened = {name: open_catalog(path) for name, path in paths.items()}
    return dict({frozenset(one.names()): (case, one) for case, one in opened.items()}.values())


CASES = golden()

# Reading a preset takes 20 ms, and here each is read some hundred times.
read_once = cache(preset_files.load_preset)


@pytest.fixture(autouse=True)
def presets_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preset_files, "load_preset", read_once)


# Names that resemble a layout, and are none that a preset reads.
STRANGERS = {
    "InternVL of XTuner": {
        "model.language_model.base_model.model.model.layers.0.attention.wqkv.lora_A.default.weight": (4, 32),
        "model.mlp1.1.weight": (32, 32),
    },
    "GPT-2": {"transformer.h.0.attn.c_attn.weight": (8, 24), "transformer.wte.weight": (9, 8)},
    "BERT": {"bert.encoder.layer.0.attention.self.query.weight": (8, 8)},
    "a model under model.": {"model.blocks.0.weight": (8, 8), "model.stem.weight": (8, 8)},
    "OPT": {"model.decoder.layers.0.self_attn.q_proj.weight": (8, 8), "lm_head.weight": (9, 8)},
    "Whisper": {"model.encoder.layers.0.self_attn.q_proj.weight": (8, 8), "model.encoder.conv1.weight": (8, 8, 3)},
    "InternVL of transformers": {
        "language_model.model.layers.0.self_attn.q_proj.weight": (8, 8),
        "multi_modal_projector.linear_1.weight": (8, 8),
        "vision_tower.encoder.layer.0.attention.q_proj.weight": (8, 8),
    },
    "nothing of the kind": {"a": (8, 8), "b.c": (8,)},
}  # fmt: skip


def another_layout(found: Catalog, preset: str) -> ShardmergeError | None:
    """What a preset says of a checkpoint's names in its first role."""
    read = read_once(preset)
    role = next(name for name, about in read.roles.items() if about.required)
    mapping = {"shardmerge": 1, "sources": {role: "x"}, "output": "y", "use": preset}
    return next(odd_layouts(parse_spec(json.dumps(mapping), "m.yaml"), read, {role: found}), None)


def misleading(found: Catalog) -> list[str]:
    """Each hint that leads to the same refusal, as preset > preset; and each that names nothing that there is."""
    odd = []
    for preset in list_presets():
        error = another_layout(found, preset)
        if error is not None:
            named = _PRESET.findall(error.hint)
            odd += [f"{preset} > {one}" for one in named if one not in list_presets() or another_layout(found, one)]
            odd += [preset] if not named and "no preset reads these names" not in error.hint else []
    return odd


@pytest.mark.parametrize("case", CASES)
def test_a_hint_names_presets_that_read_the_names(case: str) -> None:
    found = CASES[case]
    assert misleading(found) == []
    assert [one for one in foreign_presets(found)[0] if another_layout(found, one)] == []


def test_most_golden_layouts_have_a_hint() -> None:
    """Or the test above would pass on hints that never name anything."""
    silent = {case.partition("_")[0] for case, found in CASES.items() if not _hint(found)}
    assert silent == set()


def _hint(found: Catalog) -> list[str]:
    errors = (another_layout(found, preset) for preset in ("xtuner/llava-to-hf", "clip/open-clip-to-hf"))
    return [one for error in errors if error is not None for one in _PRESET.findall(error.hint)]


@pytest.mark.parametrize("name", STRANGERS)
def test_names_that_no_preset_reads_get_no_preset(name: str, tmp_path: Path) -> None:
    found = catalog(tmp_path / "m", STRANGERS[name])
    assert misleading(found) == []
    assert _hint(found) == []
    assert foreign_presets(found) == ((), "")
