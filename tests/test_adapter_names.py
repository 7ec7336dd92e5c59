"""Adapters whose names are not those of their base: vision models on three versions of transformers, prefixes, words.

The judge is peft: `golden/make/make_adapter_names.py` trained the adapters and merged them, each version by itself.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

import shardmerge as sm
from tests.adapter_runs import assert_same, gpt2, llama, merge, merged_state, opened, refused, saved, trained
from tests.conftest import GOLDEN, read_all

MADE = GOLDEN / "adapter_names"
ADAPTERS = sorted(str(path.parent.relative_to(MADE)) for path in MADE.glob("*/*/adapter_config.json"))
VERSIONS = {"4.51.3", "4.57.1", "5.23.0"}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def of_golden(folder: Path, which: str) -> None:
    shutil.copytree(MADE / Path(which).parent / "base", folder / "base")
    shutil.copytree(MADE / which, folder / "lora")


def unknown(folder: Path) -> None:
    (folder / "base" / "config.json").write_text('{"model_type": "mine"}')


def test_every_version_is_there() -> None:
    assert {Path(which).name for which in ADAPTERS} == VERSIONS
    assert len(ADAPTERS) == 32


@pytest.mark.parametrize("which", ADAPTERS)
def test_a_vision_model_by_its_names_in_memory(which: str, tmp_path: Path) -> None:
    """What peft merges with each version is what is merged here, in the base's names; and nothing else has changed."""
    of_golden(tmp_path, which)
    before = load_file(tmp_path / "base" / "model.safetensors")
    truth = load_file(MADE / which / "truth.safetensors")
    found = merge(tmp_path)
    assert set(found) == set(before)
    for name, tensor in before.items():
        ours = torch.from_numpy(np.asarray(found[name]).astype(np.float64))
        near = torch.finfo(torch.bfloat16).eps / 2  # one rounding to the base's type
        wanted = truth.get(name, tensor).double()
        assert (ours - wanted).abs().max() <= near * wanted.abs().max() + 1e-6, name
        assert name in truth or torch.equal(ours, tensor.double()), name


@pytest.mark.parametrize("which", ["llava/5.23.0", "qwen2_vl/4.57.1", "mllama/4.57.1"])
def test_the_renaming_is_in_the_plan_and_can_be_said(which: str, tmp_path: Path) -> None:
    of_golden(tmp_path, which)
    found = merge(tmp_path)
    notes = [note for one in sm.plan(tmp_path / "mapping.yaml").sources for note in one.notes if "rename: " in note]
    assert len(notes) == 1
    shutil.rmtree(tmp_path / "out")
    said = merge(tmp_path, said=f", rename: {notes[0].partition('rename: ')[2]}")
    assert {name: one.tobytes() for name, one in said.items()} == {name: one.tobytes() for name, one in found.items()}


# --- language models: prefixes in front of the base's names, or missing there


def neox() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2)).eval()


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2)).eval()


def opt() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)).eval()


MODELS = [
    (llama, ["q_proj", "down_proj"]),
    (gpt2, ["c_attn"]),
    (neox, ["query_key_value"]),
    (bert, ["query"]),
    (opt, ["fc1"]),
]


@pytest.mark.parametrize(("make", "targets"), MODELS)
def test_a_base_saved_without_its_head(tmp_path: Path, make: Callable[[], torch.nn.Module], targets: list[str]) -> None:
    whole = make()
    saved(whole.base_model, tmp_path / "base")
    model = trained(whole, tmp_path / "lora", target_modules=targets)
    found = merge(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = dict(model.merge_and_unload().base_model.state_dict())
    assert_same({name: one for name, one in found.items() if name in truth}, truth)


@pytest.mark.parametrize("prefix", ["module.", "_forward_module.", "pretrained_model.", "language_model.", "a.b."])
@pytest.mark.parametrize("side", ["adapter", "base"])
def test_a_prefix_of_one_side(tmp_path: Path, prefix: str, side: str) -> None:
    """A wrapper around the model that was trained, or around the one that was saved."""
    base = llama()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=["q_proj", "lm_head"])
    truth = merged_state(model)
    if side == "base":
        state = load_file(tmp_path / "base" / "model.safetensors")
        save_file({prefix + name: one for name, one in state.items()}, tmp_path / "base" / "model.safetensors")
        unknown(tmp_path)
        truth = {prefix + name: one for name, one in truth.items()}
    else:
        path = tmp_path / "lora" / "adapter_model.safetensors"
        inner = "base_model.model."
        save_file({f"{inner}{prefix}{name[len(inner) :]}": one for name, one in load_file(path).items()}, path)
    assert_same(merge(tmp_path), truth)


# --- what is not found


def two_models(folder: Path) -> None:
    """A base that holds a policy and its reference, and an adapter of one of them."""
    base = llama()
    saved(base, folder / "base")
    trained(opened(base, folder / "base"), folder / "lora")
    path = folder / "base" / "model.safetensors"
    state = load_file(path)
    save_file({f"{where}.{name}": one.clone() for name, one in state.items() for where in ("actor", "ref")}, path)
    unknown(folder)


def test_two_ways_are_asked_for(tmp_path: Path) -> None:
    """Each line of the hint runs, and merges into the model that it names."""
    two_models(tmp_path)
    stderr = refused(tmp_path)
    assert "[adapter-names]" in stderr
    assert "in 2 ways" in stderr
    before = load_file(tmp_path / "base" / "model.safetensors")
    lines = [part for part in stderr.split("`") if part.startswith("rename: ")]
    assert len(lines) == 2
    for line, where in zip(lines, ("actor", "ref"), strict=True):
        found = merge(tmp_path, said=f", {line}")
        changed = {name for name, one in found.items() if one.tobytes() != before[name].numpy().tobytes()}
        assert len(changed) == 4
        assert all(name.startswith(f"{where}.") for name in changed)
        shutil.rmtree(tmp_path / "out")


def test_no_part_becomes_another(tmp_path: Path) -> None:
    """Names and shapes of a decoder's layers fit the encoder's: that is proposed, and not done."""
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora")
    for path, old, new in (
        (tmp_path / "base" / "model.safetensors", "model.layers", "model.encoder.layers"),
        (tmp_path / "lora" / "adapter_model.safetensors", "model.layers", "model.decoder.layers"),
    ):
        save_file({name.replace(old, new): one for name, one in load_file(path).items()}, path)
    unknown(tmp_path)
    stderr = refused(tmp_path)
    assert "[adapter-without-base]" in stderr
    assert "names such as model.encoder.layers.0.self_attn.q_proj.weight" in stderr
    line = '"model.decoder.{rest...}": "model.encoder.{rest...}"'
    assert f"`rename: {{{line}}}`" in stderr
    assert len(merge(tmp_path, said=f", rename: {{{line}}}")) > 4


def test_language_is_not_merged_into_vision(tmp_path: Path) -> None:
    """A text adapter onto a base whose language model is of another size, and whose tower would fit."""
    of_golden(tmp_path, "llava/4.57.1")
    path = tmp_path / "base" / "model.safetensors"
    state = load_file(path)
    for name in [name for name in state if ".layers." in name and name.startswith("language_model.")]:
        state[name.replace("language_model.model", "vision_tower.vision_model.encoder")] = state.pop(name)
    save_file({name: one.contiguous() for name, one in state.items()}, path)
    unknown(tmp_path)
    assert "[adapter-without-base]" in refused(tmp_path)


def test_single_experts_and_fused_ones(tmp_path: Path) -> None:
    state = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 8, 4),
        "model.layers.0.mlp.experts.down_proj": torch.ones(2, 4, 4),
    }
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    name = "base_model.model.model.layers.0.mlp.experts.1.down_proj.lora_"
    save_file({f"{name}A.weight": torch.ones(2, 4), f"{name}B.weight": torch.ones(4, 2)}, tmp_path / "lora.safetensors")
    stderr = refused(tmp_path, adapter="lora.safetensors", said=", alpha: 2")
    assert "the experts fused" in stderr
    assert "model.layers.0.mlp.experts.gate_up_proj" in stderr


# --- what the mapping says


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ('{"model.{rest...}": "{other...}"}', "odd-rename", "bind other names"),
        ('{"model.{i:int}.{rest...}": "{rest...}"}', "odd-rename", "bind other names"),
        ('{"modle.{rest...}": "{rest...}"}', "unused-rename", "model.layers.0.self_attn.q_proj.weight"),
        ('{"model.{rest...}": "mdl.{rest...}"}', "adapter-without-base", "mdl.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_renamings_that_say_nothing(tmp_path: Path, said: str, code: str, words: str) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora")
    stderr = refused(tmp_path, said=f", rename: {said}")
    assert f"[{code}]" in stderr
    assert words in stderr


def test_the_more_specific_line_counts(tmp_path: Path) -> None:
    of_golden(tmp_path, "llava/4.57.1")
    found = merge(tmp_path)
    shutil.rmtree(tmp_path / "out")
    said = '{"model.{rest...}": "{rest...}", "model.language_model.{rest...}": "language_model.model.{rest...}", '
    again = merge(tmp_path, said=f', rename: {said}"lm_head.{{p}}": "language_model.lm_head.{{p}}"}}')
    assert {name: one.tobytes() for name, one in again.items()} == {name: one.tobytes() for name, one in found.items()}
    assert read_all(sm.inspect(tmp_path / "out")).keys() == found.keys()


def test_what_transformers_renamed_within_a_layer(tmp_path: Path) -> None:
    """The names of Mixtral's router changed behind the number of a layer: the table has it, heads alone do not."""
    disk, memory = "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"
    (tmp_path / "base").mkdir()
    weights = {f"{disk}.weight": torch.randn(4, 8), "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mixtral"}')
    pairs = {}
    for module, rows in ((memory, 4), ("model.layers.0.self_attn.q_proj", 8)):
        pairs[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 8)
        pairs[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(pairs, tmp_path / "lora.safetensors")
    mapping = "shardmerge: 1\nsources: {base: base, lora: lora.safetensors}\noutput: out\n"
    mapping += 'adapters: [{from: lora, onto: base, alpha: 2}]\ntensors: {"{rest...}": "base:{rest...}"}\n'
    (tmp_path / "mapping.yaml").write_text(mapping)
    sm.run(tmp_path / "mapping.yaml", options=sm.Options(sync=False))
    found = read_all(sm.inspect(tmp_path / "out"))
    pair = [pairs[f"base_model.model.{memory}.lora_{half}.weight"] for half in "AB"]
    wanted = weights[f"{disk}.weight"] + pair[1] @ pair[0]
    assert torch.allclose(torch.from_numpy(np.asarray(found[f"{disk}.weight"])), wanted, atol=1e-6)


@pytest.mark.parametrize("prefix", ["_forward_module.model.", "pretrained_model.", "_orig_mod."])
def test_a_wrapped_base_with_its_config_is_a_model_again(tmp_path: Path, prefix: str) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    truth = merged_state(trained(opened(base, tmp_path / "base"), tmp_path / "lora"))
    path = tmp_path / "base" / "model.safetensors"
    save_file({prefix + name: one for name, one in load_file(path).items()}, path)
    bases = {"base": str(tmp_path / "base")}
    sm.convert(tmp_path / "lora", tmp_path / "out", use="peft/merge", bases=bases, options=sm.Options(sync=False))
    assert_same(read_all(sm.inspect(tmp_path / "out")), truth)
