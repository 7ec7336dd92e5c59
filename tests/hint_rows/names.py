"""Mistakes in the names that a mapping gives and takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tests.following import Row, near, ran, said, under
from tests.hint_rows.given import LAYOUTS, changed, mapped, told
from tests.hint_rows.mapping import LLAMA, ONLY
from tests.test_mistakes import ALL_LLM, GQA, LORA, REST


def with_a_bias(folder: Path) -> None:
    """A model with a tensor more, as ``ck``."""
    shutil.copytree(LAYOUTS / "litgpt_llama_gqa/truth", folder / "ck")
    changed(folder / "ck/model.safetensors", lambda held: held.update({"lm_head.bias": torch.ones(2)}))


NAMES = [
    Row(
        "a tensor that no rule takes",
        GQA + '  "model.{rest...}": "m:model.{rest...}"\n',
        "unmatched-source",
        under("drop"),
    ),
    Row(
        "a misspelt tensor", GQA + "  head: m:lm_haed.weight\n" + ONLY, "rule-matches-nothing", near("m:lm_haed.weight")
    ),
    Row(
        "a name like no other",
        GQA + REST + '  zzz: "m:qqq0815"\n',
        "rule-matches-nothing",
        ran,
    ),
    Row(
        "a rule for what an adapter took",
        LORA
        + "adapters: [{from: lora, onto: llm}]\n"
        + ALL_LLM.replace('"}', '", extra: "lora:base_model.model.lm_head.lora_A.weight"}'),
        "rule-matches-nothing",
        told("remove this rule", ', extra: "lora:base_model.model.lm_head.lora_A.weight"', ""),
    ),
    Row(
        "a rule for what is dropped",
        GQA + '  head: m:lm_head.weight\n  "{rest...}": "m:{rest...}"\ndrop: [m:lm_head.weight]\n',
        "rule-matches-nothing",
        told("remove this rule", "  head: m:lm_head.weight\n", ""),
    ),
    Row(
        "a misspelt source",
        'sources: {trained: $gqa}\noutput: out\ntensors:\n  "{rest...}": "traned:{rest...}"\n',
        "unknown-source",
        said("traned"),
    ),
    Row(
        "a name without its source",
        GQA + '  "{rest...}": "{rest...}"\n',
        "no-source",
        lambda call: call.change('": "{rest...}"', f'": "{call.ticked()[0]}"'),
    ),
    Row(
        "a name without its source, of a preset",
        "sources: {lit: $lit}\noutput: out\nuse: llama/litgpt-to-hf\ntensors:\n  a: b\n",
        "no-source",
        told("source:name", "  a: b", "  a: lit:lm_head.weight"),
        "unexpected-target",
    ),
    Row(
        "a drop that matches nothing",
        GQA + REST + 'drop: ["m:model.layers.0.self_attn.vproj.weight"]\n',
        "drop-matches-nothing",
        near("m:model.layers.0.self_attn.vproj.weight"),
    ),
    Row(
        "a drop of nothing like it",
        GQA + REST + 'drop: ["m:{a}.qqq0815"]\n',
        "drop-matches-nothing",
        told("remove the line", 'drop: ["m:{a}.qqq0815"]\n', ""),
    ),
    Row(
        "a name the target does not have",
        LLAMA + GQA + REST + "  lm_head.bias: m:model.norm.weight\n",
        "unexpected-target",
        lambda call: call.change(f"  {call.ticked()[0]}: m:model.norm.weight\n", ""),
    ),
    Row(
        "a tensor the target does not have",
        mapped(LLAMA + GQA.replace("$gqa", "ck") + REST, before=lambda call: with_a_bias(call.folder)),
        "unexpected-target",
        under("drop"),
    ),
    Row(
        "a capture on one side only",
        GQA + '  "{rest...}": "m:model.{name...}"\n',
        "unbound-capture",
        told("the same captures on both sides", "{name...}", "{rest...}"),
        "unmatched-source",
    ),
    Row(
        "a count without `for`",
        GQA + '  "old.{rest...}": "m:{rest...}"\n'
        '  "{r}.head": {op: chunk, of: "m:lm_head.weight", chunks: 2, take: r}\n',
        "unbound-capture",
        lambda call: call.change("take: r}", f"take: r, {call.ticked()[0].replace('8', '2')}}}"),
    ),
    Row(
        "two rules for one name",
        GQA + REST + '  "{all...}": "m:{all...}"\n',
        "double-claim",
        told("move one of the two under `rest:`", '  "{all...}"', 'rest:\n  "{all...}"'),
    ),
    Row(
        "two rules for one name under `rest:` and `tensors:`",
        GQA.replace("tensors:\n", "rest:\n") + REST + '  "{all...}": "m:{all...}"\n',
        "double-claim",
        told("move one of the two to `tensors:`", '  "{all...}"', 'tensors:\n  "{all...}"'),
    ),
    Row(
        "one rule that makes a name twice",
        GQA + '  "norm.{p}": "m:model.layers.{_i}.input_layernorm.{p}"\n' + ONLY.replace("m:model", "m:lm_head"),
        "double-claim",
        told("a name of its own", '"norm.{p}": "m:model.layers.{_i}', '"norm.{i}.{p}": "m:model.layers.{i}'),
        "unmatched-source",
    ),
    Row(
        "a rule meant to replace one of a preset's, for other names too",
        "sources: {lit: $lit}\noutput: out\nuse: llama/litgpt-to-hf\ntensors:\n"
        '  "model.layers.{n:int}.input_layernorm.{p}": "lit:transformer.h.{n:int}.norm_1.{p}"\n',
        "double-claim",
        lambda call: call.change(
            '"model.layers.{n:int}.input_layernorm.{p}": "lit:transformer.h.{n:int}.norm_1.{p}"',
            f'"{call.ticked()[0]}": "lit:transformer.h.{{i}}.norm_1.weight"',
        ),
    ),
    Row(
        "an optional source that is not there",
        mapped("sources: {m: {path: nope, required: false}}\noutput: out\ntensors:\n" + REST),
        "nothing-matched",
        told("correct its path under `sources:`", "nope", "$gqa"),
    ),
    Row(
        "q and k swapped in a model with grouped queries",
        LLAMA + GQA + '  "{rest...}": "m:{rest...}"\n'
        '  "model.layers.{i}.self_attn.q_proj.weight": "m:model.layers.{i}.self_attn.k_proj.weight"\n'
        '  "model.layers.{i}.self_attn.k_proj.weight": "m:model.layers.{i}.self_attn.q_proj.weight"\n',
        "shape-mismatch",
        told(
            "would fit in each other's place",
            'self_attn.q_proj.weight": "m:model.layers.{i}.self_attn.k_proj',
            'self_attn.q_proj.weight": "m:model.layers.{i}.self_attn.q_proj',
        ),
        "shape-mismatch",
    ),
    Row(
        "a rule for the first layer alone",
        LLAMA + GQA + REST + 'drop: ["m:model.layers.1.{rest...}"]\n',
        "missing-tensor",
        told("take that line out of `drop`", 'drop: ["m:model.layers.1.{rest...}"]\n', ""),
    ),
]


ROWS = [*NAMES]
