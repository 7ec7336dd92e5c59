"""Plans of all that is at hand: every preset on checkpoints of real tools, every kind of checkpoint in tests/golden."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import shardmerge as sm
from shardmerge import api
from shardmerge.prepare.options import Prepared
from tests.conftest import GOLDEN
from tests.test_golden import ZERO, entry_of
from tests.test_invert_exact import BACK, FROZEN, XTUNER, of_case, truth, write_mapping
from tests.test_layouts import CASES as LAYOUTS
from tests.test_layouts import layout_of

# Bytes: several files of the smallest model.
SMALL_SHARDS = 40_000

Make = Callable[[Path], Prepared]

TRAINED = ("frozen_z2", "frozen_z3", "lora_both", "lora_llm", "pretrain_z2", "single_frozen", "single_trainvit")
BASES = {"llm": XTUNER / "base_llm", "vision": XTUNER / "base_clip"}
# torchao keeps how to read its codes in the headers, and is refused.
QUANTIZED = sorted(path.parent for path in GOLDEN.glob("quantized/[!t]*/config.json"))
# What the run's config does not say.
ALPHA = {"target": {"name": "peft/adapter", "trained": "trained", "alpha": "8"}}


def preset(name: str, sources: Mapping[str, Path], more: Mapping[str, object] | None = None) -> Make:
    """Returns what plans a preset, in files of a few tensors."""

    def make(folder: Path) -> Prepared:
        said = dict(more or {})
        output = {"path": str(folder / "there"), "shard_size": SMALL_SHARDS}
        return api.prepare_mapping(write_mapping(folder, name, dict(sources), {"output": output, **said}), sm.Options())

    return make


def plain(path: Path, **options: object) -> Make:
    """Returns what plans a checkpoint as it is."""
    return lambda _: api.prepare_conversion(path, options=sm.Options(**{"shard_size": SMALL_SHARDS, **options}))


def case_of(name: str) -> Path:
    """Returns the checkpoint of an XTuner run."""
    return XTUNER / name / json.loads((XTUNER / name / "case.json").read_text("utf-8"))["entry"]


def merged(folder: Path) -> Prepared:
    """An adapter that was exported from a training run, merged into its base."""
    adapter = folder / "adapter"
    made = preset("peft/export", {"trained": case_of("lora_llm")}, ALPHA)(folder)
    api.carry_out(made, adapter, sm.Options(sync=False))
    bases = {"base": str(XTUNER / "base_llm")}
    return api.prepare_conversion(
        str(adapter), use="peft/merge", bases=bases, options=sm.Options(shard_size=SMALL_SHARDS)
    )


def _presets() -> dict[str, Make]:
    found = {f"{name}": preset(layout_of(name).preset, *of_case(name)) for name in LAYOUTS}
    for name, sources, more, source in BACK:
        found.setdefault(f"{name} {source}".strip(), preset(name, sources, more))
    for name in TRAINED:
        sources = {"trained": case_of(name), **BASES}
        found |= {f"{use} {name}": preset(use, sources) for use in ("xtuner/llava-to-hf", "xtuner/llava-to-xtuner")}
    tuned = {"tuned": XTUNER / "base_llm", "base": XTUNER / "base_llm"}
    found["peft/extract"] = preset("peft/extract", tuned, {"let": {"rank": 4}})
    found["peft/export"] = preset("peft/export", {"trained": case_of("lora_llm")}, ALPHA)
    for ranks in (1, 2):
        more = {"let": {"ranks": ranks}}
        found[f"llama/hf-to-meta {ranks}"] = preset("llama/hf-to-meta", {"hf": truth("meta_llama3_tp2_gqa")}, more)
    llama = {"delta": truth("litgpt_llama_gqa"), "base": truth("litgpt_llama_gqa")}
    return {**found, "llama/apply-delta": preset("llama/apply-delta", llama), "peft/merge": merged}


PRESETS: Mapping[str, Make] = _presets()
KINDS: Mapping[str, Make] = {
    **{path.name: plain(entry_of(path)) for path in ZERO},
    **{f"{path.name} cast": plain(entry_of(path), dtype="bfloat16", format="bin") for path in ZERO[::3]},
    "trainer": plain(GOLDEN / "hf_trainer" / "checkpoint-2", dtype="float16"),
    "module": lambda _: api.prepare_conversion(GOLDEN / "zero" / "llama_z2_w2_bf16" / "ckpt", view="module"),
    **{path.name: plain(path) for path in QUANTIZED},
    "merges": plain(GOLDEN / "merges" / "float32.safetensors"),
}
PLANS: Mapping[str, Make] = {**PRESETS, **KINDS}

__all__ = ["FROZEN", "KINDS", "PLANS", "PRESETS", "Make", "plain", "preset"]
