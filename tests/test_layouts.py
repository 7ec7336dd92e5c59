"""Layouts of other tools through presets, bit for bit against what the tools' own converters made of the same files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.presets_in_use import LAYOUTS, compare_bits, kinds, read_tensors, use_preset


@dataclass(frozen=True, slots=True)
class Layout:
    """How the cases of a family are converted.

    Attributes
    ----------
    preset
        Its name.
    sources
        Of the preset, as paths inside of the case; ``ENTRY`` is what the case says.
    let
        Numbers that the mapping has to say.
    tolerance
        Largest difference of any element, for arithmetic in float32; 0 for the same bits.
    more
        What else the mapping says.
    """

    preset: str
    sources: Mapping[str, str]
    let: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    more: Mapping[str, object] = field(default_factory=dict)


ENTRY = "ENTRY"

# source/lora.json: rank 4, alpha 12.
_LORA = Layout(
    "llama/torchtune-lora-to-hf",
    {"tune": "source/base.pt", "adapter": "source/epoch_0/adapter_model.pt", "base": "truth"},
    {"scale": 3},
    2e-6,
)

# The encoder is in the checkpoint, and the CLIP that its config names, which has the sizes, is not here. The target
# adds rows for `<image>` and `<pad>`, which the golden truth leaves out, since the tool draws them at random.
_OFFICIAL = {"drop": ["vision:{rest...}"]}

_DIST = {"megatron": ENTRY, "base": "truth"}

# By the beginning of the case's name.
TABLE = {
    "meta_": Layout("llama/meta-to-hf", {"meta": "source"}),
    "litgpt_": Layout("llama/litgpt-to-hf", {"lit": "source"}),
    "torchtune_llama3_gqa": Layout("llama/torchtune-to-hf", {"tune": ENTRY, "base": "truth"}),
    "torchtune_llama3_lora": _LORA,
    "torchtune_llama3_dora": _LORA,
    "torchtune_phi3": Layout("llama/torchtune-phi3-to-hf", {"tune": ENTRY, "base": "truth"}),
    "open_clip_": Layout("clip/open-clip-to-hf", {"clip": ENTRY}),
    "llava15_official": Layout("llava/official-to-hf", {"llava": ENTRY, "vision": "truth"}, more=_OFFICIAL),
    "llava_next_official": Layout("llava/official-to-hf-next", {"llava": ENTRY, "vision": "truth"}, more=_OFFICIAL),
    "llava_names_": Layout("hf/to-4.51", {"hf": ENTRY}),
    "phi3_to_llama_": Layout("llama/phi3-to-llama", {"phi": ENTRY}),
    "internvl_": Layout("internvl/original-to-hf", {"internvl": ENTRY}),
    "torch_dist_qwen3_moe": Layout("llama/megatron-dist-to-hf-qwen3-moe", _DIST),
    **{
        f"torch_dist_{kind}": Layout("llama/megatron-dist-to-hf", _DIST)
        for kind in ("llama", "qwen2", "qwen3_tp2", "mixtral", "nemo")
    },
    "megatron_": Layout("llama/megatron-to-hf", {"megatron": ENTRY, "base": "truth"}),
}

CASES = sorted(path.parent.name for path in LAYOUTS.glob("*/case.json"))


def layout_of(case: str) -> Layout:
    """Returns the row of the table; a case that has none is an error."""
    (prefix,) = (prefix for prefix in TABLE if case.startswith(prefix))
    return TABLE[prefix]


def sources_of(case: str) -> dict[str, Path]:
    """Returns the preset's sources."""
    entry = json.loads((LAYOUTS / case / "case.json").read_text("utf-8"))["entry"]
    return {name: LAYOUTS / case / (entry if path == ENTRY else path) for name, path in layout_of(case).sources.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_preset_makes_what_the_tool_makes(case: str, tmp_path: Path) -> None:
    layout = layout_of(case)
    found = read_tensors(use_preset(layout.preset, sources_of(case), tmp_path / "out", layout.let, more=layout.more))
    truth = read_tensors(LAYOUTS / case / "truth")
    if layout.more is _OFFICIAL:
        found = {name: one[: len(truth[name])] if _is_vocabulary(name) else one for name, one in found.items()}
    if not layout.tolerance:
        compare_bits(found, truth)
        return
    assert kinds(found) == kinds(truth)
    apart = {name: float((found[name] - truth[name]).abs().max()) for name in truth}
    assert {name: most for name, most in apart.items() if not most <= layout.tolerance} == {}


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def test_torchtune_adapter_changes_every_module(tmp_path: Path) -> None:
    """Without `scale` the merge would be the base; the truth differs from it in every projection."""
    case = "torchtune_llama3_lora"
    sources = sources_of(case)
    plain = {"tune": sources["tune"], "base": sources["base"]}
    base = read_tensors(use_preset("llama/torchtune-to-hf", plain, tmp_path / "base"))
    truth = read_tensors(LAYOUTS / case / "truth")
    same = [name for name in truth if torch.equal(base[name], truth[name])]
    assert not any("_proj" in name for name in same)
