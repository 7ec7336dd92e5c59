"""Mistakes as a new user makes them, on small checkpoints of real tools, through the real command line.

Every row of the table is a mapping or a command with one mistake. It must be refused before anything is written, with
a stable code, the place, and the way out in words that can be pasted; where the row says so, the mapping with that fix
applied must plan. A mistake that cannot be seen is in the table too, as a comment: in a model without grouped queries
q and k have one shape and one meaning for every check, so swapping them is the user's to know. With grouped queries
their shapes differ, and that is tested.
"""

from __future__ import annotations

import gc
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from shardmerge.cli.main import main
from shardmerge.signals import STOPS
from tests.conftest import GOLDEN, shardmerge

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Mistake:
    """A row of the table.

    Attributes
    ----------
    about
        What the user did.
    given
        The mapping below its first line, or the command's arguments. ``$name`` is a checkpoint of ``WORLD``.
    code, where, fix
        Of the message: its stable code, a part of the line `at`, and what it must offer.
    cure
        (old, new): with this done, the mapping plans. None where the cure is another file.
    status
        Exit code.
    """

    about: str
    given: str | tuple[str, ...]
    code: str
    where: str
    fix: str
    cure: tuple[str, str] | None = None
    status: int = 1


GQA = "sources: {m: $gqa}\noutput: out\ntensors:\n"
REST = '  "{rest...}": "m:{rest...}"\n'
Q = "model.layers.{i}.self_attn.q_proj.weight"
K = "model.layers.{i}.self_attn.k_proj.weight"
KEPT = (
    "  lm_head.weight: m:lm_head.weight\n"
    '  "model.{n:norm|embed_tokens}.weight": "m:model.{n:norm|embed_tokens}.weight"\n'
    '  "model.layers.{i}.{n:mlp|self_attn}.{p:gate_proj|up_proj|down_proj|v_proj|o_proj}.weight": '
    '"m:model.layers.{i}.{n:mlp|self_attn}.{p:gate_proj|up_proj|down_proj|v_proj|o_proj}.weight"\n'
    '  "model.layers.{i}.{n:input_layernorm|post_attention_layernorm}.weight": '
    '"m:model.layers.{i}.{n:input_layernorm|post_attention_layernorm}.weight"\n'
)
DROP = 'drop: ["m:{rest...}.weight"]\n'
LLAMA = "target: {name: hf/llama, text: m}\n"
XTUNER = "sources: {trained: $frozen, llm: $llm, vision: $clip}\noutput: out\nuse: xtuner/llava-to-hf\n"
MERGED = "adapters: [{from: lora, onto: llm}]\n"
LORA = "sources: {llm: $base, lora: $lora}\noutput: out\n"
ALL_LLM = 'tensors: {"{rest...}": "llm:{rest...}"}\n'


def one_op(op: str, of: str = "m:model.norm.weight", more: str = "") -> str:
    """A mapping whose one rule is an op over one tensor, the rest kept as it is under another name."""
    return f'{GQA}  "old.{{rest...}}": "m:{{rest...}}"\n  made: {{op: {op}, of: "{of}"{more}}}\n'


NAMES = [
    Mistake(
        "a wrong prefix",
        'sources: {m: $trained_clip}\noutput: out\ntensors:\n  "visual.{r...}": "m:modul.visual.{r...}"\n'
        '  "{r...}": "m:module.{r...}"\n',
        "rule-matches-nothing",
        "mapping.yaml:5:3",
        "module.visual.",
        None,
    ),
    Mistake(
        "a tensor that no rule takes",
        GQA + '  "model.{rest...}": "m:model.{rest...}"\n',
        "unmatched-source",
        "mapping.yaml",
        "`- m:lm_head.weight`",
        ("tensors:", "drop:\n  - m:lm_head.weight\ntensors:"),
    ),
    Mistake(
        "a misspelt tensor",
        GQA + "  head: m:lm_haed.weight\n" + DROP.replace("{rest...}.weight", "model.{rest...}"),
        "rule-matches-nothing",
        "mapping.yaml:5:3",
        "m:lm_head.weight",
        ("lm_haed", "lm_head"),
    ),
    Mistake(
        "two rules for one name",
        GQA + REST + '  "{all...}": "m:{all...}"\n',
        "double-claim",
        "mapping.yaml:6:3",
        "move one of the two under `rest:`",
        ('  "{all...}"', 'rest:\n  "{all...}"'),
    ),
    Mistake(
        "a misspelt source",
        'sources: {trained: $gqa}\noutput: out\ntensors:\n  "{rest...}": "traned:{rest...}"\n',
        "unknown-source",
        "mapping.yaml:5:16",
        "`trained`",
        ("traned", "trained"),
    ),
    Mistake(
        "a name without its source",
        GQA + '  "{rest...}": "{rest...}"\n',
        "no-source",
        "mapping.yaml:5:16",
        "`m:{rest...}`",
        (': "{rest', ': "m:{rest'),
    ),
    Mistake(
        "braces without quotes",
        GQA + "  {rest...}: m:{rest...}\n",
        "yaml-key",
        "mapping.yaml:5:3",
        '"{rest...}": ',
        ("  {rest...}: m:{rest...}", '  "{rest...}": "m:{rest...}"'),
    ),
    Mistake(
        "a capture on one side only",
        GQA + '  "{rest...}": "m:model.{name...}"\n',
        "unbound-capture",
        "mapping.yaml:5:16",
        "the same captures on both sides",
        None,
    ),
    Mistake(
        "a drop that matches nothing",
        GQA + REST + 'drop: ["m:model.layers.{i}.self_attn.inv_freq"]\n',
        "drop-matches-nothing",
        "mapping.yaml:6:8",
        "near names: m:model.layers.0.self_attn.v_proj.weight",
        None,
    ),
    Mistake(
        "a misspelt key",
        GQA.replace("tensors", "tensor") + REST,
        "unknown-key",
        "mapping.yaml:4:1",
        "`tensors`",
        ("tensor:", "tensors:"),
    ),
    Mistake(
        "a rule for the first layer alone",
        LLAMA + GQA + '  "{rest...}": "m:{rest...}"\ndrop: ["m:model.layers.1.{rest...}"]\n',
        "missing-tensor",
        "mapping.yaml",
        "model.layers.1.",
        ('drop: ["m:model.layers.1.{rest...}"]', ""),
    ),
    Mistake(
        "a name the target does not have",
        LLAMA + GQA + REST + "  lm_head.bias: m:model.norm.weight\n",
        "unexpected-target",
        "mapping.yaml:7:3",
        "remove the rule `lm_head.bias`",
        ("  lm_head.bias: m:model.norm.weight\n", ""),
    ),
    Mistake(
        "q and k swapped in a model with grouped queries",
        f'{LLAMA}{GQA}{KEPT}  "{Q}": "m:{K}"\n  "{K}": "m:{Q}"\n',
        "shape-mismatch",
        "mapping.yaml:10:3",
        "are the two swapped?",
        (f'"{Q}": "m:{K}"\n  "{K}": "m:{Q}"', f'"{Q}": "m:{Q}"\n  "{K}": "m:{K}"'),
    ),
]

OPS = [
    Mistake(
        "an op that does not exist",
        one_op("trnspose", "m:lm_head.weight"),
        "unknown-op",
        "mapping.yaml:6:14",
        "`transpose`",
        ("trnspose", "transpose"),
    ),
    Mistake(
        "a misspelt parameter",
        one_op("concat", "m:model.layers.{e*}.input_layernorm.weight", ", dims: 0"),
        "unknown-key",
        "mapping.yaml:6",
        "`dim`",
        ("dims", "dim"),
    ),
    Mistake(
        "sizes that do not add up",
        one_op("split", more=", sizes: [16, 15], take: 0"),
        "op-shape",
        "mapping.yaml:6",
        "expected: 31 at dim 0",
        ("15", "16"),
    ),
    Mistake(
        "a part that is not there",
        one_op("split", more=", sizes: [16, 16], take: 2"),
        "op-value",
        "mapping.yaml:6",
        "expected: 0 to 1",
        ("take: 2", "take: 1"),
    ),
    Mistake(
        "heads that do not divide the rows",
        one_op("rotary_permute", "m:lm_head.weight", ", heads: 5"),
        "op-shape",
        "mapping.yaml:6",
        "heads",
        ("heads: 5", "heads: 4"),
    ),
    Mistake(
        "a misspelt config key",
        one_op("rotary_permute", "m:model.layers.0.self_attn.q_proj.weight", ", heads: m.config.num_atention_heads"),
        "unknown-value",
        "mapping.yaml:6",
        "m.config.num_attention_heads",
        ("atention", "attention"),
    ),
    Mistake(
        "a misspelt variable",
        "let: {heads: m.config.num_attention_heads}\n"
        + one_op("rotary_permute", "m:model.layers.0.self_attn.q_proj.weight", ", heads: haeds"),
        "unused-variable",
        "mapping.yaml:2:7",
        "did you mean `haeds`? A formula names it",
        ("haeds", "heads"),
    ),
    Mistake(
        "a number nobody knows",
        one_op("chunk", more=", chunks: ranks, take: 0"),
        "unknown-value",
        "mapping.yaml:6",
        "`let: {ranks: NUMBER}`",
        ("chunks: ranks", "chunks: 2"),
    ),
    Mistake(
        "a variable that nothing uses",
        "let: {chunk: 2}\n" + one_op("chunk", more=", chunks: chunks, take: 0"),
        "unused-variable",
        "mapping.yaml:2:7",
        "did you mean `chunks`?",
        ("chunk: 2", "chunks: 2"),
    ),
    Mistake(
        "a variable defined by itself",
        "let: {heads: heads // 2}\n" + one_op("rotary_permute", "m:lm_head.weight", ", heads: heads"),
        "circular-value",
        "mapping.yaml:7",
        "heads -> heads",
        ("heads // 2", "4"),
    ),
    Mistake(
        "a formula of another language",
        one_op("chunk", more=", chunks: 2 ** 1, take: 0"),
        "bad-formula",
        "mapping.yaml:6",
        "+ - * / // %",
        ("2 ** 1", "2 * 1"),
    ),
    Mistake(
        "a division with a rest",
        one_op("chunk", more=", chunks: 2, take: 1 / 2"),
        "op-value",
        "mapping.yaml:6",
        "//",
        ("1 / 2", "1 // 2"),
    ),
    Mistake(
        "an operand that is not there",
        one_op("add", "[m:model.norm.weight, m:model.nrom.weight]").replace('"[', "[").replace(']"', "]"),
        "missing-operand",
        "mapping.yaml:6",
        "near names: m:model.norm.weight",
        ("nrom", "norm"),
    ),
    Mistake(
        "a collecting name without an op",
        GQA + '  made: "m:model.layers.{e*}.input_layernorm.weight"\n',
        "collecting-one",
        "mapping.yaml:5",
        "concat or stack",
        None,
    ),
    Mistake(
        "a collecting name in an op of one tensor",
        one_op("transpose", "m:model.layers.{e*}.mlp.up_proj.weight"),
        "collecting-one",
        "mapping.yaml:6:29",
        "`transpose` takes one",
        None,
    ),
    Mistake(
        "a count without `for`",
        GQA
        + '  "old.{rest...}": "m:{rest...}"\n  "{r}.head": {op: chunk, of: "m:lm_head.weight", chunks: 2, take: r}\n',
        "unbound-capture",
        "mapping.yaml:6",
        "`for: {r: ",
        ("take: r}", "take: r, for: {r: 2}}"),
    ),
    Mistake(
        "concat of other shapes",
        one_op("concat", "", ", dim: 1").replace('""', "[m:lm_head.weight, m:model.layers.0.mlp.up_proj.weight]"),
        "op-shape",
        "mapping.yaml:6",
        "dim",
        (", dim: 1", ""),
    ),
    Mistake(
        "concat of numbers and weights",
        'sources: {m: $mixed}\noutput: out\ntensors:\n  w: {op: concat, of: ["m:w", "m:ids"]}\n',
        "op-shape",
        "mapping.yaml:5",
        "expected: one type",
        None,
    ),
    Mistake(
        "arithmetic on positions",
        'sources: {m: $mixed}\noutput: out\ntensors:\n  w: m:w\n  ids: {op: scale, of: "m:ids", factor: 2}\n',
        "op-shape",
        "mapping.yaml:6",
        "only floats are computed with",
        None,
    ),
    Mistake(
        "a dimension that is not there",
        one_op("concat", "", ", dim: 2").replace('""', "[m:lm_head.weight, m:lm_head.weight]"),
        "op-shape",
        "mapping.yaml:6",
        "a dim from -2 to 1",
        (", dim: 2", ", dim: 1"),
    ),
    Mistake(
        "a parameter forgotten",
        one_op("rotary_permute", "m:lm_head.weight"),
        "missing-parameter",
        "mapping.yaml:6",
        "`heads: ...`",
        None,
    ),
    Mistake(
        "a vector transposed",
        one_op("transpose"),
        "op-shape",
        "mapping.yaml:6",
        "found: 1 dimensions",
        ("m:model.norm", "m:lm_head"),
    ),
    Mistake(
        "new rows made in no known way",
        one_op("new_rows", "m:lm_head.weight", ", rows: 4, new: avg"),
        "op-value",
        "mapping.yaml:6",
        "mean",
        ("avg", "mean"),
    ),
    Mistake(
        "the same mistake in every layer is told once",
        GQA
        + '  "old.{rest...}": "m:{rest...}"\n'
        + '  "{i}.q": {op: rotary_permute, of: "m:model.layers.{i}.self_attn.q_proj.weight", heads: 5}\n',
        "op-shape",
        "mapping.yaml:6",
        "heads",
        ("heads: 5", "heads: 4"),
    ),
]

ADAPTERS = [
    Mistake(
        "an adapter that nothing uses",
        LORA + ALL_LLM,
        "unmerged-adapter",
        "adapter",
        "`adapters: [{from: lora, onto: ",
        ("output: out", "output: out\nadapters: [{from: lora, onto: llm}]"),
    ),
    Mistake(
        "an adapter onto another model",
        LORA.replace("$base", "$clip") + MERGED + ALL_LLM,
        "adapter-without-base",
        "mapping.yaml:4",
        "trained on",
        ("$clip", "$base"),
    ),
    Mistake(
        "an adapter onto a model of another size",
        LORA.replace("$base", "$llm") + MERGED + ALL_LLM,
        "op-shape",
        "mapping.yaml:4",
        "name the base that the adapter was trained on",
        ("$llm", "$base"),
    ),
    Mistake(
        "alpha is nowhere",
        LORA.replace("$lora", "$no_alpha") + MERGED + ALL_LLM,
        "unknown-alpha",
        "mapping.yaml:4",
        "alpha: NUMBER}",
        ("onto: llm}", "onto: llm, alpha: 12}"),
    ),
    Mistake(
        "alpha is not a number",
        LORA + "adapters: [{from: lora, onto: llm, alpha: r}]\n" + ALL_LLM,
        "odd-setting",
        "mapping.yaml:4",
        "positive number",
        ("alpha: r", "alpha: 12"),
    ),
    Mistake(
        "a config of another run",
        LORA.replace("$lora", "$other_rank") + MERGED + ALL_LLM,
        "adapter-rank",
        "mapping.yaml:4",
        "`r: 4`",
        ("onto: llm}", "onto: llm, r: 4}"),
    ),
    Mistake(
        "an adapter onto 4-bit weights",
        LORA.replace("$base", "$packed") + MERGED + ALL_LLM,
        "packed-weights",
        "packed",
        "16-bit",
        ("$packed", "$base"),
    ),
    Mistake(
        "4-bit weights in an op",
        "sources: {m: $packed}\noutput: out\ntensors:\n  " + '"{rest...}": "m:{rest...}"\n'
        '  head: {op: transpose, of: "m:lm_head.weight"}\n',
        "packed-weights",
        "mapping.yaml:6",
        "16-bit",
        ("$packed", "$base"),
    ),
    Mistake(
        "4-bit weights as a model",
        LLAMA + "sources: {m: $packed}\noutput: out\ntensors:\n" + REST,
        "packed-weights",
        "mapping.yaml:6",
        "16-bit",
        ("$packed", "$base"),
    ),
    Mistake(
        "an adapter's tensors in a rule",
        LORA + MERGED + ALL_LLM.replace('"}', '", extra: "lora:base_model.model.lm_head.lora_A.weight"}'),
        "rule-matches-nothing",
        "mapping.yaml:5",
        "`adapters:` merges lora:",
        None,
    ),
    Mistake(
        "an adapter merged twice",
        LORA + "adapters: [{from: lora, onto: llm}, {from: lora, onto: llm}]\n" + ALL_LLM,
        "adapter-twice",
        "mapping.yaml:4:37",
        "remove one of the two",
        (", {from: lora, onto: llm}", ""),
    ),
    Mistake(
        "a directory with the adapter's config alone",
        LORA.replace("$lora", "$no_weights") + MERGED + ALL_LLM,
        "missing-adapter",
        "no_weights",
        "adapter_model.safetensors",
        ("$no_weights", "$lora"),
    ),
    Mistake(
        "an adapter converted alone",
        ("convert", "$lora", "out"),
        "adapter-alone",
        "adapter",
        "--base base=MODEL",
        None,
    ),
    Mistake(
        "from and onto swapped",
        LORA + "adapters: [{from: llm, onto: lora}]\n" + ALL_LLM,
        "not-an-adapter",
        "mapping.yaml:4",
        "names with `lora_A` and `lora_B`",
        ("{from: llm, onto: lora}", "{from: lora, onto: llm}"),
    ),
    Mistake(
        "an adapter of no source",
        LORA + "adapters: [{from: loar, onto: llm}]\n" + ALL_LLM,
        "unknown-source",
        "mapping.yaml:4",
        "`lora`",
        ("loar", "lora"),
    ),
    Mistake(
        "two adapters in one file",
        "sources: {llm: $linear, lora: $two}\noutput: out\nadapters: [{from: lora, onto: llm, alpha: 8}]\n" + ALL_LLM,
        "several-adapters",
        "mapping.yaml:4",
        "`name: default`",
        ("alpha: 8", "alpha: 8, name: default"),
    ),
    Mistake(
        "alpha of a run whose config was not saved",
        "sources: {llm: $linear, lora: $one}\noutput: out\nadapters: [{from: lora, onto: llm}]\n" + ALL_LLM,
        "unknown-alpha",
        "mapping.yaml:4",
        "alpha: NUMBER",
        ("onto: llm}", "onto: llm, alpha: 8}"),
    ),
]

VOCABULARY = [
    Mistake(
        "fewer rows than the model has",
        LLAMA + GQA.replace("output", "vocabulary: {rows: 100}\noutput") + REST,
        "vocabulary-rows",
        "mapping.yaml:2",
        "trim: true",
        ("rows: 100", "rows: 100, trim: true"),
    ),
    Mistake(
        "fewer rows than the tokens need",
        XTUNER + "vocabulary: {rows: 299, trim: true}\n",
        "vocabulary-rows",
        "llava-to-hf.yaml:14:9",
        "{rows: 300}",
        ("{rows: 299, trim: true}", "{rows: 300}"),
    ),
    Mistake(
        "head and embedding of different rows",
        (LLAMA + GQA + REST).replace("$gqa", "$ragged"),
        "shape-mismatch",
        "mapping.yaml:6",
        "`vocabulary: {rows: 112}`",
        ("output: out", "output: out\nvocabulary: {rows: 112}"),
    ),
    Mistake(
        "a vocabulary without a target",
        GQA.replace("output", "vocabulary: {rows: 128}\noutput") + REST,
        "no-target",
        "mapping.yaml",
        "target: {name: hf/llama",
        ("vocabulary: {rows: 128}\n", ""),
    ),
    Mistake(
        "an unknown way to make rows",
        LLAMA + GQA.replace("output", "vocabulary: {rows: 128, new: random}\noutput") + REST,
        "op-value",
        "mapping.yaml:4",
        "normal",
        ("random", "normal"),
    ),
]

PRESETS = [
    Mistake(
        "a misspelt preset",
        XTUNER.replace("llava-to-hf", "llava2hf"),
        "unknown-preset",
        "",
        "`xtuner/llava-to-hf`",
        ("llava2hf", "llava-to-hf"),
        2,
    ),
    Mistake(
        "a misspelt source of a preset",
        XTUNER.replace("trained:", "traind:"),
        "missing-source",
        "mapping.yaml",
        "`trained: PATH`",
        ("traind:", "trained:"),
    ),
    Mistake(
        "a forgotten base",
        "sources: {trained: $alone}\noutput: out\nuse: xtuner/llava-to-hf\n",
        "missing-source",
        "",
        "vision: base_clip",
        ("$alone}", "$alone, llm: $llm, vision: $clip}"),
    ),
    Mistake(
        "LLM and encoder swapped",
        XTUNER.replace("$llm", "$x").replace("$clip", "$llm").replace("$x", "$clip"),
        "unsupported-architecture",
        "base_clip/config.json",
        "llama, mistral, mixtral",
        None,
    ),
    Mistake(
        "a base of a preset forgotten",
        "sources: {tune: $tune}\noutput: out\nuse: llama/torchtune-to-hf\n",
        "missing-source",
        "mapping.yaml",
        "`base: PATH`",
        ("tune: $tune", "tune: $tune, base: $gqa"),
    ),
    Mistake(
        "litgpt's preset for Meta's files",
        ("convert", "$meta", "out", "--use", "llama/litgpt-to-hf"),
        "another-layout",
        "source",
        "`llama/meta-to-hf`",
        None,
    ),
    Mistake(
        "Meta's preset for a Hugging Face directory",
        ("convert", "$gqa", "out", "--use", "llama/meta-to-hf"),
        "another-layout",
        "truth",
        "llama/hf-to-meta",
        None,
    ),
    Mistake(
        "torchtune's preset for litgpt's file",
        "sources: {tune: $lit, base: $gqa}\noutput: out\nuse: llama/torchtune-to-hf\n",
        "another-layout",
        "lit_model.pth",
        "`llama/litgpt-to-hf`",
        None,
    ),
    Mistake(
        "open_clip's preset for a Hugging Face CLIP",
        ("convert", "$clip", "out", "--use", "clip/open-clip-to-hf"),
        "another-layout",
        "base_clip",
        "`clip/hf-to-open-clip`",
        None,
    ),
    Mistake(
        "XTuner's preset for open_clip's file",
        "sources: {trained: $openclip, llm: $llm, vision: $clip}\noutput: out\nuse: xtuner/llava-to-hf\n",
        "another-layout",
        "open_clip_pytorch_model.bin",
        "`clip/open-clip-to-hf`",
        None,
    ),
    Mistake(
        "a rule meant to replace one of a preset's, for other names too",
        "sources: {lit: $lit}\noutput: out\nuse: llama/litgpt-to-hf\ntensors:\n"
        '  "model.layers.{n:int}.input_layernorm.{p}": "lit:transformer.h.{n:int}.norm_1.{p}"\n',
        "double-claim",
        "mapping.yaml:6:3",
        "to the letter: `model.layers.{i}.input_layernorm.weight`",
        (
            'model.layers.{n:int}.input_layernorm.{p}": "lit:transformer.h.{n:int}.norm_1.{p}',
            'model.layers.{i}.input_layernorm.weight": "lit:transformer.h.{i}.norm_1.weight',
        ),
    ),
    Mistake(
        "a source that the preset does not know",
        ("convert", "$frozen", "out", "--use", "xtuner/llava-to-hf", "--base", "lllm=$llm"),
        "unknown-source",
        "",
        "expected: llm, vision",
        None,
        2,
    ),
    Mistake(
        "a base without a preset",
        ("convert", "$frozen", "out", "--base", "llm=$llm"),
        "no-preset",
        "",
        "--use PRESET",
        None,
        2,
    ),
    Mistake(
        "a source that nobody uses",
        XTUNER.replace("vision:", "clip: $clip, vision:"),
        "unknown-source",
        "mapping.yaml:2",
        "known here: llm, trained, vision",
        ("clip: $clip, ", ""),
    ),
    Mistake(
        "a variable that the preset does not know",
        "sources: {hf: $gqa}\noutput: out\nuse: llama/hf-to-litgpt\nlet: {kv_head: 2}\n",
        "unused-variable",
        "mapping.yaml:5:7",
        "`kv_heads`",
        ("kv_head:", "kv_heads:"),
    ),
]

OUTPUT = [
    Mistake(
        "keep of a name that is not there",
        GQA.replace("output: out", "output: {path: out, keep: [model.nrom.weight]}") + REST,
        "keep-matches-nothing",
        "mapping.yaml:3",
        "model.norm.weight",
        ("nrom", "norm"),
    ),
    Mistake(
        "a type that does not exist",
        GQA.replace("output: out", "output: {path: out, dtype: bf61}") + REST,
        "unknown-dtype",
        "mapping.yaml:3",
        "bf16",
        ("bf61", "bf16"),
    ),
    Mistake(
        "a format that does not exist",
        GQA.replace("output: out", "output: {path: out, format: gguf}") + REST,
        "unknown-format",
        "mapping.yaml:3",
        "`format: safetensors` or `format: bin`",
        ("gguf", "bin"),
    ),
    Mistake(
        "no output",
        GQA.replace("output: out\n", "") + REST,
        "no-output",
        "mapping.yaml",
        "--out",
        ("tensors:", "output: out\ntensors:"),
        2,
    ),
    Mistake(
        "a target that does not exist",
        "target: {name: hf/lama, text: m}\n" + GQA + REST,
        "unknown-target",
        "mapping.yaml:2",
        "`hf/llama`",
        ("hf/lama", "hf/llama"),
        2,
    ),
    Mistake(
        "a role that the target does not have",
        "target: {name: hf/llama, llm: m}\n" + GQA + REST,
        "unknown-role",
        "mapping.yaml:2",
        "text",
        ("llm: m", "text: m"),
        2,
    ),
]

SOURCES = [
    Mistake(
        "a rank of Meta's left behind",
        ("convert", "$one_rank", "out", "--use", "llama/meta-to-hf"),
        "missing-rank",
        "one_rank",
        "consolidated.01.pth",
        None,
    ),
    Mistake(
        "a prefix that is not there",
        "sources: {m: {path: $gqa, strip: module.}}\noutput: out\ntensors:\n" + REST,
        "strip-matches-nothing",
        "mapping.yaml:2",
        "`strip`",
        (", strip: module.", ""),
    ),
    Mistake(
        "a misspelt path",
        GQA.replace("$gqa", "$world/linaer.safetensors") + REST,
        "missing-path",
        "mapping.yaml:2",
        "linear.safetensors",
        ("linaer", "linear"),
        2,
    ),
    Mistake(
        "a view that does not exist",
        "sources: {m: {path: $zero, view: fp16}}\noutput: out\ntensors:\n" + REST,
        "unknown-view",
        "mapping.yaml:2",
        "`view: module` or `view: fp32`",
        ("fp16", "module"),
    ),
    Mistake(
        "a state dict that is not there",
        "sources: {m: {path: $wrapped, root: state_dct}}\noutput: out\ntensors:\n" + REST,
        "unknown-root",
        "mapping.yaml:2:11",
        "state_dict",
        ("state_dct", "state_dict"),
        2,
    ),
    Mistake(
        "a source forgotten in the rules",
        GQA.replace("m: $gqa", "m: $gqa, extra: $mixed") + REST,
        "unmatched-source",
        "mapping.yaml",
        "`- extra:w`",
        None,
    ),
]

TABLE = [*NAMES, *OPS, *ADAPTERS, *VOCABULARY, *PRESETS, *OUTPUT, *SOURCES]


# --- the checkpoints ---

LAYOUTS = GOLDEN / "layouts"
READY = {
    "gqa": LAYOUTS / "litgpt_llama_gqa/truth",
    "meta": LAYOUTS / "meta_llama2_tp2_gqa/source",
    "lit": LAYOUTS / "litgpt_llama_gqa/source",
    "tune": LAYOUTS / "torchtune_llama3_gqa/source/epoch_0",
    "openclip": LAYOUTS / "open_clip_published/source",
    "trained_clip": LAYOUTS / "open_clip_trained/source/epoch_1.pt",
    "base": LAYOUTS / "torchtune_llama3_lora/truth",
    "lora": LAYOUTS / "torchtune_llama3_lora/truth/adapter",
    "llm": GOLDEN / "xtuner/base_llm",
    "clip": GOLDEN / "xtuner/base_clip",
    "frozen": GOLDEN / "xtuner/single_frozen/iter_2.pth",
    "zero": GOLDEN / "zero/llama_z2_w2_bf16/ckpt",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All checkpoints by name: those of the golden folder, and small ones made here."""
    folder = tmp_path_factory.mktemp("world")
    made = {
        "alone": folder / "run" / "iter_2.pth",
        "one_rank": folder / "one_rank",
        "no_alpha": adapter_with(folder / "no_alpha", lora_alpha=None),
        "other_rank": adapter_with(folder / "other_rank", r=8),
        "no_weights": adapter_with(folder / "no_weights"),
        "packed": changed(READY["base"], folder / "packed", packed),
        "ragged": changed(READY["gqa"], folder / "ragged", ragged),
        "mixed": folder / "mixed.safetensors",
        "wrapped": folder / "wrapped.pth",
        **adapted(folder),
    }
    (folder / "run").mkdir()
    shutil.copy(READY["frozen"], made["alone"])
    shutil.copytree(READY["meta"], made["one_rank"])
    (made["one_rank"] / "consolidated.01.pth").unlink()
    (made["no_weights"] / "adapter_model.safetensors").unlink()
    save_file({"w": torch.ones(4, 3), "ids": torch.arange(12).reshape(4, 3)}, made["mixed"])
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, made["wrapped"])
    return {**READY, **made, "world": folder}


def adapter_with(folder: Path, **settings: object) -> Path:
    """A copy of the adapter whose config says something else; None takes a key away."""
    shutil.copytree(READY["lora"], folder)
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def changed(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a model whose tensors went through a function."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors")
    return folder


def packed(tensors: Tensors) -> Tensors:
    """Linear layers as bitsandbytes saves them: two codes a byte, beside the largest magnitudes."""
    state = dict(tensors)
    for name in [name for name in tensors if "_proj." in name or name.startswith("lm_head")]:
        half = tensors[name].numel() // 2
        state[name] = torch.zeros(half, 1, dtype=torch.uint8)
        state[f"{name}.absmax"] = torch.ones(half // 32 + 1)
        state[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)
    return state


def ragged(tensors: Tensors) -> Tensors:
    """An embedding that was resized without its head."""
    embed = tensors["model.embed_tokens.weight"]
    return {
        **tensors,
        "model.embed_tokens.weight": torch.cat([embed, embed[:8]])[:112],
        "lm_head.weight": embed[:104].clone(),
    }


def adapted(folder: Path) -> dict[str, Path]:
    """A layer, and the state dict of peft's model over it with one adapter and with two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    paths = {name: folder / f"{name}.safetensors" for name in ("linear", "one", "two")}
    save_file(model.state_dict(), paths["linear"])
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["0"])
    wrapped = get_peft_model(model, config)
    for name in ("one", "two"):
        state = {key: value.clone() for key, value in wrapped.state_dict().items() if "base_layer" not in key}
        save_file(state, paths[name])
        if name == "one":
            wrapped.add_adapter("second", config)
    return paths


# --- the test ---


def filled(text: str, world: Mapping[str, Path]) -> str:
    """Puts the paths in; longer names first, so that `$lora` does not take a part of another."""
    for name in sorted(world, key=len, reverse=True):
        text = text.replace(f"${name}", str(world[name]))
    return text


def called(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs the command line in this process, and returns its exit code.

    The process is its own as a rule: what it does to signals, to finalizers and to the collector of garbage is undone.
    """
    monkeypatch.setattr(sys, "argv", ["shardmerge", *arguments])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGCHLD)}
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        gc.enable()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return int(left.value.code or 0)


def stamps(folders: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Size and time of every file of the sources."""
    files = [file for folder in folders for file in ([folder] if folder.is_file() else sorted(folder.rglob("*")))]
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def written(row: Mistake, world: Mapping[str, Path], folder: Path, given: str) -> list[str]:
    """Writes the row's mapping, if it is one, and returns the arguments that carry it out."""
    if isinstance(row.given, tuple):
        return [filled(argument, world) for argument in row.given]
    (folder / "mapping.yaml").write_text("shardmerge: 1\n" + filled(given, world))
    return ["run", "mapping.yaml", "--no-sync"]


def blocks(stderr: str) -> list[str]:
    """The errors of a run, each with its lines."""
    return ["error: " + block for block in stderr.split("error: ") if block.strip()]


def place(block: str) -> str:
    return next((line for line in block.splitlines() if line.startswith("  at: ")), "")


def test_the_table_is_large_enough_and_names_each_mistake_once() -> None:
    assert len(TABLE) >= 80
    assert len({row.about for row in TABLE}) == len(TABLE)
    assert all(row.fix for row in TABLE)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.about.replace(" ", "-"))
def test_a_mistake_is_stopped_before_anything_is_written(
    row: Mistake,
    world: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = written(row, world, tmp_path, row.given if isinstance(row.given, str) else "")
    before, sources = sorted(tmp_path.rglob("*")), stamps(world.values())

    status = called(arguments, monkeypatch)

    said = capsys.readouterr()
    assert status == row.status, said.err
    assert not said.out
    assert "Traceback" not in said.err
    assert "this is a bug" not in said.err
    ours = [block for block in blocks(said.err) if f"[{row.code}]" in block]
    assert ours, said.err
    assert any(row.where in place(block) and row.fix in block for block in ours), said.err
    assert all("  hint: " in block or "  expected: " in block or row.fix in block for block in ours), said.err
    assert sorted(tmp_path.rglob("*")) == before
    assert stamps(world.values()) == sources


CURED = [row for row in TABLE if row.cure is not None]


@pytest.mark.parametrize("row", CURED, ids=lambda row: row.about.replace(" ", "-"))
def test_the_fix_is_all_that_was_wrong(
    row: Mistake,
    world: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert isinstance(row.given, str)
    assert row.cure is not None
    assert row.cure[0] in row.given
    monkeypatch.chdir(tmp_path)
    _, mapping, *_ = written(row, world, tmp_path, row.given.replace(*row.cure))
    status = called(["plan", mapping], monkeypatch)
    assert status == 0, capsys.readouterr().err


# --- what the table cannot say ---


def test_a_process_of_its_own_says_the_same(world: dict[str, Path], tmp_path: Path) -> None:
    row = next(row for row in TABLE if row.code == "double-claim")
    assert isinstance(row.given, str)
    (tmp_path / "mapping.yaml").write_text("shardmerge: 1\n" + filled(row.given, world))
    done = shardmerge("run", tmp_path / "mapping.yaml", code=1)
    assert "[double-claim]" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mapping.yaml"]


def test_a_mistake_in_every_layer_is_one_error(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in TABLE if "told once" in row.about)
    assert isinstance(row.given, str)
    monkeypatch.chdir(tmp_path)
    called(written(row, world, tmp_path, row.given), monkeypatch)
    found = blocks(capsys.readouterr().err)
    assert len(found) == 1
    assert "0.q, 1.q: " in found[0]


@pytest.mark.parametrize("name", ["meta", "lit", "tune", "openclip", "trained_clip"])
def test_a_preset_that_meets_another_layout_says_one_thing(
    name: str,
    world: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not twenty errors about tensors that are missing and tensors that are left over."""
    called(["convert", str(world[name]), str(tmp_path / "out"), "--use", "xtuner/llava-to-hf"], monkeypatch)
    found = blocks(capsys.readouterr().err)
    assert len(found) == 1
    hint = found[0].partition("hint: these names are read by ")[2]
    assert f"`{ROADS[name].split()[0]}`" in hint


ROADS = {
    "meta": "llama/meta-to-hf",
    "lit": "llama/litgpt-to-hf",
    "tune": "llama/torchtune-to-hf --base base=PATH",
    "openclip": "clip/open-clip-to-hf",
    "trained_clip": "clip/open-clip-to-hf",
    "gqa": "",
    "clip": "",
    "zero": "",
}


@pytest.mark.parametrize("name", ROADS)
def test_a_plain_conversion_points_to_the_preset(
    name: str,
    world: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names of Meta, litgpt, torchtune and open_clip load nowhere else: a warning, since the user may want them."""
    assert called(["convert", str(world[name]), str(tmp_path / "out"), "--dry-run"], monkeypatch) == 0
    said = capsys.readouterr().err
    assert said == (f"warning: every tensor keeps its name: for a Hugging Face model add --use {ROADS[name]}\n"
                    if ROADS[name] else "")  # fmt: skip


def test_packed_weights_are_copied_where_nothing_is_promised(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes and scales together are still what they were."""
    assert called(["convert", str(world["packed"]), str(tmp_path / "out"), "--no-sync", "-q"], monkeypatch) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (world["packed"], tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_of_the_users_replaces_the_presets(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an alpha of its own it is merged once, not once more on top of the preset's."""
    run = GOLDEN / "xtuner/lora_llm/work_dirs/iter_2.pth"
    text = XTUNER.replace("$frozen", str(run)) + (
        'adapters: [{from: "trained:llm.{rest...}", onto: "llm:{rest...}", alpha: 16}]\n'
    )
    (tmp_path / "mapping.yaml").write_text("shardmerge: 1\n" + filled(text, world))
    assert called(["plan", str(tmp_path / "mapping.yaml")], monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.count("merged from trained") == 1
    assert "alpha 16 from the mapping" in said
