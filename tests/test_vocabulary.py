"""Vocabularies resized and heads tied: what transformers loads of it, against what transformers does itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import shardmerge as sm
from tests.conftest import GOLDEN

transformers = pytest.importorskip("transformers")

ROWS = 40


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=ROWS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(base: Path, *lines: str, target: str = "") -> Path:
    """Converts with the lines added to the mapping and returns the directory."""
    text = (
        f"shardmerge: 1\nsources: {{hf: {base}}}\noutput: {base.parent / 'out'}\nuse: llama/hf-to-hf\n{target}\n"
        + "\n".join(lines)
    )
    (base.parent / "m.yaml").write_text(text + "\n")
    return sm.run(base.parent / "m.yaml").path


def both(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and head of the model that transformers loads, which finds every tensor in its shape."""
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(model.lm_head.weight)
    return model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()


@pytest.mark.parametrize(
    ("line", "rows"), [("{rows: 48}", 48), ("{multiple: 64}", 64), ("{rows: 30, trim: true}", 30), ("{rows: 40}", 40)]
)
def test_rows_of_both_matrices_and_of_the_config(base: Path, line: str, rows: int) -> None:
    old = transformers.LlamaForCausalLM.from_pretrained(base)
    kept = min(rows, ROWS)
    embedding, head = both(run(base, f"vocabulary: {line}"))
    assert len(embedding) == len(head) == rows
    assert torch.equal(embedding[:kept], old.model.embed_tokens.weight[:kept])
    assert torch.equal(head[:kept], old.lm_head.weight[:kept])


def test_new_rows_are_the_mean_rounded_once(base: Path) -> None:
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    embedding, _ = both(run(base, "vocabulary: {rows: 44}"))
    assert torch.equal(embedding[ROWS:], old.double().mean(dim=0).to(torch.bfloat16).expand(4, -1))


def test_new_rows_are_zero_or_a_copy(base: Path) -> None:
    old = load_file(base / "model.safetensors")["lm_head.weight"]
    _, head = both(run(base, "vocabulary: {rows: 44, new: copy, row: 7}"))
    assert torch.equal(head[ROWS:], old[7].expand(4, -1))


def test_new_rows_are_zero(base: Path) -> None:
    _, head = both(run(base, "vocabulary: {rows: 44, new: zeros}"))
    assert not head[ROWS:].any()


def test_normal_rows_have_the_old_ones_mean_and_deviation_and_a_seed(base: Path) -> None:
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double().numpy()
    out = run(base, "vocabulary: {rows: 4040, new: normal, seed: 3}")
    first, head = (tensor.double().numpy() for tensor in both(out))
    new = first[ROWS:]
    error = old.std(axis=0) / np.sqrt(len(new))
    assert np.all(np.abs(new.mean(axis=0) - old.mean(axis=0)) < 5 * error)
    assert np.allclose(new.std(axis=0), old.std(axis=0), rtol=0.1)
    assert not np.array_equal(new, head[ROWS:])


def test_fewer_rows_need_to_be_allowed(base: Path) -> None:
    with pytest.raises(sm.ShardmergeError) as caught:
        run(base, "vocabulary: {rows: 30}")
    assert "trim" in str(caught.value)
    assert not (base.parent / "out").exists()


def test_a_head_is_tied_and_untied(base: Path) -> None:
    tied = run(base, target='target: {name: hf/llama, text: hf, tie: "true"}')
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    model = transformers.LlamaForCausalLM.from_pretrained(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = (
        f"shardmerge: 1\nsources: {{hf: {tied}}}\noutput: {base.parent / 'loose'}\nuse: llama/hf-to-hf\n"
        'target: {name: hf/llama, text: hf, tie: "false"}\n'
    )
    (base.parent / "n.yaml").write_text(text)
    embedding, head = both(sm.run(base.parent / "n.yaml").path)
    assert torch.equal(embedding, head)


def test_some_tensors_keep_another_type(base: Path) -> None:
    text = (
        f"shardmerge: 1\nsources: {{hf: {base}}}\nuse: llama/hf-to-hf\n"
        f"output: {{path: {base.parent / 'out'}, dtype: float16, keep: ['model.norm.weight'], "
        "dtypes: {'model.layers.{i}.{n}_layernorm.weight': float32}}\n"
    )
    (base.parent / "m.yaml").write_text(text)
    made = load_file(sm.run(base.parent / "m.yaml").path / "model.safetensors")
    assert made["model.norm.weight"].dtype == torch.bfloat16
    assert made["model.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert made["model.embed_tokens.weight"].dtype == torch.float16


def test_a_run_exports_its_adapter(tmp_path: Path) -> None:
    """XTuner's language model adapter as peft loads it, with the values of the run."""
    peft = pytest.importorskip("peft")
    run_of = GOLDEN / "xtuner" / "lora_llm"
    entry = run_of / json.loads((run_of / "case.json").read_text())["entry"]
    text = (
        f"shardmerge: 1\nsources: {{trained: {entry}}}\noutput: {tmp_path / 'adapter'}\nuse: peft/export\n"
        "target: {name: peft/adapter, trained: trained, under: llm., alpha: '8'}\n"
    )
    (tmp_path / "m.yaml").write_text(text)
    out = sm.run(tmp_path / "m.yaml").path
    config = peft.PeftConfig.from_pretrained(out)
    truth = load_file(run_of / "truth.safetensors")
    made = load_file(out / "adapter_model.safetensors")
    expected = {n.removeprefix("llm.").replace(".default", ""): t for n, t in truth.items() if ".lora_" in n}
    assert (config.r, config.lora_alpha) == (4, 8)
    assert set(made) == set(expected)
    assert all(torch.equal(made[name].double(), expected[name].double()) for name in made)
