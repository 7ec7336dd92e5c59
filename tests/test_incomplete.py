"""A part of a model, or a model inside of a wrapper, beside the config.json of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from benchmarks.synthetic import write_zero
from shardmerge.errors import ShardmergeError
from shardmerge.publish.verify import verify_directory
from tests.conftest import shardmerge

transformers = pytest.importorskip("transformers")

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
State = dict[str, torch.Tensor]


def model(folder: Path, family: str = "Llama", **changes: object) -> State:
    """Saves a model whose tensors all differ, and returns its state dict."""
    torch.manual_seed(0)
    if family == "GPT2":
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2, **changes))
    else:
        config = getattr(transformers, f"{family}Config")
        values = {**_SIZES, "tie_word_embeddings": False, "pad_token_id": 0, **changes}
        made = getattr(transformers, f"{family}ForCausalLM")(config(**values))
    made.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def rewritten(folder: Path, state: State) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def opens(folder: Path) -> bool:
    """Whether transformers loads the directory as its config.json says."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    _, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    return not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def refused(folder: Path) -> ShardmergeError:
    with pytest.raises(ShardmergeError) as found:
        sm.convert(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()
    return found.value


# ---- parts


PARTS: dict[str, Callable[[str], bool]] = {
    "a layer": lambda name: ".layers.2." not in name and ".h.2." not in name,
    "a layer in the middle": lambda name: ".layers.1." not in name and ".h.1." not in name,
    "the embedding": lambda name: not name.endswith(("embed_tokens.weight", "wte.weight")),
    "all but one kind of layer": lambda name: "mlp" in name,
    "the head": lambda name: name != "lm_head.weight",
    "one norm": lambda name: not name.endswith("layers.1.input_layernorm.weight"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_known_model_is_refused_and_named(part: str, tmp_path: Path) -> None:
    state = model(tmp_path / "a")
    rewritten(tmp_path / "a", {name: tensor for name, tensor in state.items() if PARTS[part](name)})
    error = refused(tmp_path / "a")
    lacking = [name for name in state if not PARTS[part](name)]
    assert error.code == "incomplete-model"
    assert any(name in error.what for name in lacking)
    assert str(tmp_path / "a" / "config.json") == error.where


@pytest.mark.parametrize("family", ["Qwen3", "Gemma", "GPT2", "Mixtral", "GPTNeoX", "Phi3"])
@pytest.mark.parametrize("part", ["a layer", "a layer in the middle"])
def test_layers_that_any_model_lacks_are_seen(family: str, part: str, tmp_path: Path) -> None:
    state = model(tmp_path / "a", family)
    assert sm.convert(tmp_path / "a", tmp_path / "whole").path
    rewritten(tmp_path / "a", {name: tensor for name, tensor in state.items() if PARTS[part](name)})
    assert refused(tmp_path / "a").code == "incomplete-model"


@pytest.mark.parametrize("family", ["Qwen3", "Phi3"])
def test_a_head_that_any_causal_model_lacks_is_seen(family: str, tmp_path: Path) -> None:
    state = model(tmp_path / "a", family)
    rewritten(tmp_path / "a", {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
    assert refused(tmp_path / "a").code == "incomplete-model"


def test_a_classifier_without_its_classifier(tmp_path: Path) -> None:
    model(tmp_path / "a", "Qwen3")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for name in ("Qwen3ForSequenceClassification", "LlamaForSequenceClassification"):
        config["architectures"] = [name]
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        assert refused(tmp_path / "a").code == "incomplete-model"


def test_both_ways_of_the_hint_lead_on(tmp_path: Path) -> None:
    """The part is completed by the base that a mapping names, or asked for as a part."""
    state = model(tmp_path / "base")
    model(tmp_path / "trained")
    part = {name: tensor + 1 for name, tensor in state.items() if "mlp" in name}
    rewritten(tmp_path / "trained", part)
    hint = refused(tmp_path / "trained").hint
    tensors = hint.split("`")[1]
    target = hint.split("`")[3]
    (tmp_path / "mapping.yaml").write_text(
        f"shardmerge: 1\nsources: {{trained: trained, base: base}}\noutput: out\n{target}\n{tensors}\n"
    )
    done = sm.run(tmp_path / "mapping.yaml")
    assert opens(done.path)
    result = load_file(done.path / "model.safetensors")
    assert all(torch.equal(result[name], part.get(name, tensor)) for name, tensor in state.items())
    assert "--partial" in hint
    told = shardmerge("convert", tmp_path / "trained", tmp_path / "part", "--partial", "-q")
    assert "model.embed_tokens.weight" in told.stderr
    assert set(load_file(tmp_path / "part" / "model.safetensors")) == set(part)
    verify_directory(tmp_path / "part")


def test_a_mapping_asks_for_a_part(tmp_path: Path) -> None:
    model(tmp_path / "a")
    text = (
        "shardmerge: 1\nsources: {a: a}\noutput: OUTPUT\ntarget: {name: hf/model, text: a}\n"
        'tensors: {"model.{t:embed_tokens|norm}.weight": "a:model.{t}.weight"}\n'
        'drop: ["a:model.layers.{rest...}", "a:lm_head.weight"]\n'
    )
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(text.replace("OUTPUT", "{path: out}"))
    with pytest.raises(ShardmergeError) as refusal:
        sm.run(mapping)
    assert refusal.value.code == "incomplete-model"
    mapping.write_text(text.replace("OUTPUT", "{path: out, partial: true}"))
    assert any("only a part" in warning for warning in sm.run(mapping).plan.warnings)


def test_a_part_of_another_model_is_refused_all_the_same(tmp_path: Path) -> None:
    """``partial`` allows that tensors lack, not that those which are there contradict."""
    state = model(tmp_path / "a")
    state["model.norm.weight"] = torch.ones(16)
    rewritten(tmp_path / "a", {name: tensor for name, tensor in state.items() if "lm_head" not in name})
    done = shardmerge("convert", tmp_path / "a", tmp_path / "out", "--partial", code=1)
    assert "[config-disagrees]" in done.stderr
    assert "[incomplete-model]" not in done.stderr


def test_without_a_config_nothing_is_claimed(tmp_path: Path) -> None:
    """A state dict of trained parameters alone (``exclude_frozen_parameters``) is what it is."""
    write_zero(tmp_path / "run", {"a.weight": (7, 5)}, stage=2, world=2, fill=True)
    assert sm.convert(tmp_path / "run", tmp_path / "out").plan.warnings == ()


# ---- tied


def test_a_head_that_is_not_the_embedding_it_is_said_to_be(tmp_path: Path) -> None:
    """transformers 4 puts the embedding in its place, 5 keeps it: two models from one directory."""
    state = model(tmp_path / "a", tie_word_embeddings=True)
    same = {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    rewritten(tmp_path / "a", same)
    sm.convert(tmp_path / "a", tmp_path / "same")
    rewritten(tmp_path / "a", {**same, "lm_head.weight": same["lm_head.weight"] + 1})
    error = refused(tmp_path / "a")
    assert error.code == "config-disagrees"
    assert "tie_word_embeddings" in error.expected
    config = tmp_path / "a" / "config.json"  # the hint, to the letter
    assert error.hint == f"correct `tie_word_embeddings` to false in {config}"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    assert opens(sm.convert(tmp_path / "a", tmp_path / "out").path)


# ---- wrappers


WRAPPERS = (
    "module.", "_forward_module.", "_forward_module.model.", "_orig_mod.", "module.module.", "model.", "policy.model.",
    "pretrained_model.", "_fsdp_wrapped_module.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_wrapper_of_a_known_model_is_taken_off_and_told(prefix: str, tmp_path: Path) -> None:
    state = model(tmp_path / "a")
    rewritten(tmp_path / "a", {prefix + name: tensor for name, tensor in state.items()})
    result = sm.convert(tmp_path / "a", tmp_path / "out")
    assert any(f"`{prefix.split('.', maxsplit=1)[0]}" in warning for warning in result.plan.warnings)
    assert load_file(result.path / "model.safetensors").keys() == state.keys()
    assert opens(result.path)


@pytest.mark.parametrize("family", ["Qwen3", "GPT2", "Gemma"])
@pytest.mark.parametrize("prefix", ["module.", "_forward_module.", "_forward_module.model.", "_orig_mod.", "model."])
def test_a_wrapper_of_any_causal_model(family: str, prefix: str, tmp_path: Path) -> None:
    state = model(tmp_path / "a", family)
    rewritten(tmp_path / "a", {prefix + name: tensor for name, tensor in state.items()})
    result = sm.convert(tmp_path / "a", tmp_path / "out")
    assert load_file(result.path / "model.safetensors").keys() == state.keys()


def test_wrappers_inside_of_names(tmp_path: Path) -> None:
    """FSDP and activation checkpointing wrap layers, torch.compile any module."""
    state = model(tmp_path / "a")
    inside = {
        name.replace("model.", "model._fsdp_wrapped_module.").replace(
            ".mlp.", "._checkpoint_wrapped_module.mlp._orig_mod."
        ): tensor
        for name, tensor in state.items()
    }
    rewritten(tmp_path / "a", inside)
    result = sm.convert(tmp_path / "a", tmp_path / "out")
    assert load_file(result.path / "model.safetensors").keys() == state.keys()


def test_what_the_trainer_keeps_beside_the_model_is_left_out_and_told(tmp_path: Path) -> None:
    state = model(tmp_path / "a")
    wrapped = {f"_forward_module.model.{name}": tensor for name, tensor in state.items()}
    rewritten(tmp_path / "a", {**wrapped, "_forward_module.loss_mean": torch.zeros(1)})
    result = sm.convert(tmp_path / "a", tmp_path / "out")
    assert load_file(result.path / "model.safetensors").keys() == state.keys()
    assert any("loss_mean" in warning for warning in result.plan.warnings)
    assert [one.name for one in result.plan.unused] == ["loss_mean"]  # as a rule would name it


def test_two_models_in_one_file_are_not_mixed(tmp_path: Path) -> None:
    """A policy and its reference: which is meant cannot be known."""
    state = model(tmp_path / "a")
    both = {f"{who}.{name}": tensor + (who == "ref") for name, tensor in state.items() for who in ("policy", "ref")}
    rewritten(tmp_path / "a", both)
    assert refused(tmp_path / "a").code == "incomplete-model"


def test_without_a_config_every_name_stays(tmp_path: Path) -> None:
    save_file({"module.a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    result = sm.convert(tmp_path / "model.safetensors", tmp_path / "out")
    assert set(load_file(result.path / "model.safetensors")) == {"module.a.weight"}


def test_a_value_head_stays_and_is_told(tmp_path: Path) -> None:
    """Loading ignores it, and whoever wants it finds it."""
    state = model(tmp_path / "a")
    rewritten(tmp_path / "a", {**state, "v_head.summary.weight": torch.ones(1, 32)})
    result = sm.convert(tmp_path / "a", tmp_path / "out")
    assert "v_head.summary.weight" in load_file(result.path / "model.safetensors")
    assert any("v_head" in warning for warning in result.plan.warnings)
