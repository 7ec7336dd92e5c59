"""What an adapter does beside adding products: names, absent parts, several adapters, ties, a vocabulary, token rows.

The judge is peft on the same input, and transformers for what is loaded; otherwise the run is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import shardmerge as sm
from tests.adapter_runs import (
    IDS,
    WEIGHTS,
    assert_same,
    base_state,
    change_config,
    change_tensors,
    gpt2,
    llama,
    merge,
    merged_state,
    opened,
    refusal,
    refused,
    saved,
    shaken,
    trained,
    write_mapping,
)
from tests.conftest import read_all

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PREFIX = "base_model.model.model.layers.0.self_attn."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = llama()
    saved(base, folder / "base")
    trained(opened(base, folder / "base"), folder / "lora")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


# --- absent is absent


def emptied(folder: Path, names: Callable[[str], bool], form: str) -> None:
    """Placeholders as a ZeRO-3 run leaves them that saved before it gathered."""
    state = load_file(folder / WEIGHTS)
    state = {name: torch.empty(0) if names(name) else tensor for name, tensor in state.items()}
    (folder / WEIGHTS).unlink()
    if form == "bin":
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("which", ["lora_", "lora_B", "layers.1.self_attn.v_proj.lora_A"])
def test_empty_tensors_are_refused(run: Path, which: str, form: str) -> None:
    emptied(run / "lora", lambda name: which in name, form)
    stderr = refused(run)
    assert "[empty-adapter]" in stderr
    assert "placeholders [0]" in stderr
    assert "gathered" in stderr
    assert "global_stepN" in stderr


def test_a_rank_of_zero_is_empty(run: Path) -> None:
    change_tensors(
        run / "lora",
        {PREFIX + "q_proj.lora_A.weight": torch.zeros(0, 16), PREFIX + "q_proj.lora_B.weight": torch.zeros(16, 0)},
    )
    assert "[empty-adapter]" in refused(run)


def test_an_empty_head_is_refused_too(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", modules_to_save=["lm_head"])
    emptied(tmp_path / "lora", lambda name: "lm_head" in name, "safetensors")
    assert "[empty-adapter]" in refused(tmp_path)


def test_frozen_placeholders_of_a_dump_give_way_to_the_base(tmp_path: Path) -> None:
    """A 16-bit dump of ZeRO-3 holds the frozen weights as [0]; the base has them, and that is told."""
    base = llama()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"))
    state = {name: one if "lora_" in name else torch.empty(0) for name, one in model.state_dict().items()}
    save_file({name: one.contiguous() for name, one in state.items()}, tmp_path / "dump.safetensors")
    found = merge(tmp_path, adapter="dump.safetensors", said=", alpha: 8")
    warnings_ = sm.plan(tmp_path / "mapping.yaml").warnings
    assert any("without numbers" in text for text in warnings_)
    assert_same(found, merged_state(model))


def test_no_pair_at_all_is_no_adapter(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", modules_to_save=["lm_head"])
    names = load_file(tmp_path / "lora" / WEIGHTS)
    change_tensors(tmp_path / "lora", dict.fromkeys(name for name in names if "lora_" in name))
    assert "[adapter-incomplete]" in refused(tmp_path)


# --- names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (PREFIX + "q_proj.lora_C.weight", "lora_C"), (PREFIX + "q_proj.lora_A.bias", "lora_A"),
        (PREFIX + "q_proj.hada_w1_a", "LyCORIS"), (PREFIX + "q_proj.oft_R.weight", "oft_R"),
        (PREFIX + "q_proj.vera_lambda_b", "vera_lambda_b"), (PREFIX + "q_proj.lokr_w1", "lokr_w1"),
        (PREFIX + "q_proj.lora_E", "lora_E"), (PREFIX + "q_proj.lora_diag", "lora_diag"),
        (PREFIX + "q_proj.lora_down.weight", "kohya"),
    ],
)  # fmt: skip
def test_a_part_that_no_lora_has_is_refused(run: Path, name: str, words: str) -> None:
    change_tensors(run / "lora", {name: torch.zeros(4, 16)})
    stderr = refused(run)
    assert "[unknown-adapter-tensor]" in stderr
    assert words in stderr


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("lora_unet_down_blocks_0_attn.lora_down.weight", "adapter-without-base", "kohya"),
        ("unet.down.0.lora.down.weight", "adapter-without-base", "unet.down.0"),
        ("model.layers.0.self_attn.q_proj.lora_a", "adapter-incomplete", "lora_B"),
        ("model.layers.0.self_attn.q_proj.hada_w1_a", "unknown-adapter-tensor", "LyCORIS"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter-incomplete", "lora_B"),
    ],
)
def test_half_of_an_adapter_of_another_make_is_none(run: Path, name: str, code: str, words: str) -> None:
    """Whole ones are merged: tests/test_adapter_tools.py."""
    save_file({name: torch.zeros(4, 16)}, run / "lora" / WEIGHTS)
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(run / "lora", run / "out", bases={"base": str(run / "base")})
    for text in (refused(run), " ".join(str(caught.value).split())):
        assert f"[{code}]" in text
        assert words in text


def test_a_prefix_in_front_of_all_names_is_told(run: Path) -> None:
    """The hint is a line to paste."""
    state = {f"mine.{name}": tensor for name, tensor in load_file(run / "lora" / WEIGHTS).items()}
    save_file(state, run / "run.safetensors")
    stderr = refused(run, adapter="run.safetensors", said=", alpha: 8")
    assert "[not-an-adapter]" in stderr
    assert '`from: "run_safetensors:mine.{rest...}"`' in stderr
    path = run / "mapping.yaml"
    path.write_text(path.read_text().replace("from: run_safetensors", 'from: "run_safetensors:mine.{rest...}"'))
    sm.run(path, options=sm.Options(sync=False))
    found = {name: array.tobytes() for name, array in read_all(sm.inspect(run / "out")).items()}
    shutil.rmtree(run / "out")
    assert found == {name: array.tobytes() for name, array in merge(run).items()}


def test_another_shape_than_the_base_is_refused(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", modules_to_save=["lm_head"])
    change_tensors(tmp_path / "lora", {"base_model.model.lm_head.weight": torch.zeros(24, 8)})
    assert "[adapter-shape]" in refused(tmp_path)


# --- several adapters


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict with the adapters `policy` and `reference`, each with a head of its own."""
    folder = tmp_path_factory.mktemp("two")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True)
    base = llama()
    saved(base, folder / "base")
    model = get_peft_model(base, config, adapter_name="policy")
    model.add_adapter("reference", config)
    for seed, name in enumerate(("policy", "reference")):
        model.set_adapter(name)
        shaken(model, seed + 1)
    torch.save(model.state_dict(), folder / "run.pth")
    for name in ("policy", "reference"):
        model.save_pretrained(folder / "saved", selected_adapters=[name])
    return folder


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_a_name_holds_for_every_part(two: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(two, tmp_path / "run")
    found = merge(tmp_path / "run", adapter="run.pth", said=f", alpha: 8, name: {name}")
    alone = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(two / "base"), two / "saved" / name)
    assert_same(found, merged_state(alone))


def test_a_name_is_asked_for_and_checked(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    folder = tmp_path / "run"
    assert "[several-adapters]" in (stderr := refused(folder, adapter="run.pth", said=", alpha: 8"))
    assert "policy, reference" in stderr
    stderr = refused(folder, adapter="run.pth", said=", alpha: 8, name: polcy")
    assert "[unknown-adapter]" in stderr
    assert "did you mean `policy`?" in stderr


def test_two_heads_alone_are_two_adapters(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "run.pth")
    torch.save({name: one for name, one in state.items() if "modules_to_save" in name}, tmp_path / "run" / "run.pth")
    assert "[several-adapters]" in refused(tmp_path / "run", adapter="run.pth", said=", alpha: 8")


def test_a_name_where_there_are_none_is_an_error(run: Path) -> None:
    assert "[unknown-adapter]" in (stderr := refused(run, said=", name: default"))
    assert "remove `name:`" in stderr


KINDS = {
    "dora": {"use_dora": True},
    "lora": {},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
}


@pytest.mark.parametrize("kinds", ["dora dora", "lora dora", "dora lora", "dora dora dora", "embedding embedding"])
def test_several_on_one_module_are_what_peft_computes_with_all_active(tmp_path: Path, kinds: str) -> None:
    """Each norm is that of the untouched base and the adapter's own product (huggingface/peft#3608)."""
    base = llama()
    saved(base, tmp_path / "base")
    names = [f"l{number}" for number, _ in enumerate(kinds.split())]
    for seed, (name, kind) in enumerate(zip(names, kinds.split(), strict=True)):
        settings = {"target_modules": ["q_proj", "down_proj"]} | KINDS[kind]
        trained(opened(base, tmp_path / "base"), tmp_path / name, seed, **settings)
    model = PeftModel.from_pretrained(opened(base, tmp_path / "base"), tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(tmp_path / name, name)
    model.base_model.set_adapter(names)
    live = model.eval()(IDS).logits
    merged = model.merge_and_unload()
    assert (merged(IDS).logits - live).abs().max() < 1e-5  # peft agrees with itself
    path = write_mapping(tmp_path, [f"from: {name}, onto: base" for name in names], "base", names)
    sm.run(path, options=sm.Options(sync=False))
    assert_same(read_all(sm.inspect(tmp_path / "out")), merged.state_dict(), 3e-6)


@pytest.mark.parametrize("order", [("head", "lora"), ("lora", "head"), ("head", "head")])
def test_a_weight_that_one_replaces_is_not_added_to(tmp_path: Path, order: tuple[str, str]) -> None:
    """peft allows modules_to_save in one active adapter alone."""
    base = llama()
    saved(base, tmp_path / "base")
    kinds = {"head": {"modules_to_save": ["lm_head"]}, "lora": {"target_modules": ["lm_head"]}}
    for place, kind in enumerate(order):
        trained(opened(base, tmp_path / "base"), tmp_path / f"l{place}", place, **kinds[kind])
    write_mapping(tmp_path, ["from: l0, onto: base", "from: l1, onto: base"], "base", ["l0", "l1"])
    assert "[adapters-clash]" in refusal(tmp_path)


# --- Linear and Conv1D


LAYERS = {
    "square Conv1D and a Linear": ["attn.c_proj", "lm_head"],
    "a Linear first": ["lm_head", "attn.c_proj", "c_attn"],
    "every Conv1D": ["c_attn", "c_proj", "c_fc"],
}


@pytest.mark.parametrize("filed", [True, False, None])
@pytest.mark.parametrize("case", LAYERS)
def test_conv1d_is_known_layer_by_layer(tmp_path: Path, case: str, *, filed: bool | None) -> None:
    """Whatever the file says: peft writes the value of the last layer that it wrapped."""
    base = gpt2()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=LAYERS[case])
    if filed is not None:
        change_config(tmp_path / "lora", fan_in_fan_out=filed)
    assert_same(merge(tmp_path), merged_state(model))


def test_an_unknown_square_layer_is_asked_for(tmp_path: Path) -> None:
    """Without config.json a layer that widens tells; without one of those, the user has to."""
    base = gpt2()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=["attn.c_proj"])
    change_config(tmp_path / "lora", fan_in_fan_out=False)
    truth = merged_state(model)
    path = write_mapping(tmp_path, ["from: lora, onto: base"], "base", ["lora"])
    path.write_text(path.read_text().replace("target: {name: hf/model, text: base}\n", ""))
    (tmp_path / "base" / "config.json").unlink()
    sm.run(path, options=sm.Options(sync=False))
    assert_same(read_all(sm.inspect(tmp_path / "out")), truth)
    shutil.rmtree(tmp_path / "out")
    state = load_file(tmp_path / "base" / "model.safetensors")
    square = {name: one for name, one in state.items() if "c_attn" not in name and "c_fc" not in name}
    save_file(square, tmp_path / "base" / "model.safetensors")
    assert "[unknown-layer]" in (stderr := refusal(tmp_path))
    assert "fan_in_fan_out: true" in stderr
    path.write_text(path.read_text().replace("onto: base}", "onto: base, fan_in_fan_out: true}"))
    sm.run(path, options=sm.Options(sync=False))
    assert_same(read_all(sm.inspect(tmp_path / "out")), {name: truth[name] for name in square})


def test_square_layers_of_a_llama_are_linear_whatever_the_file_says(run: Path) -> None:
    truth = {name: array.tobytes() for name, array in merge(run).items()}
    shutil.rmtree(run / "out")
    change_config(run / "lora", fan_in_fan_out=True)  # peft warns, and takes it back
    assert {name: array.tobytes() for name, array in merge(run).items()} == truth


# --- tied embeddings, a grown vocabulary, tokens


TIED = {
    "embedding whole": {"modules_to_save": ["embed_tokens"]},
    "head whole": {"modules_to_save": ["lm_head"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding by LoRA": {"target_modules": ["embed_tokens", "q_proj"]},
    "head by LoRA": {"target_modules": ["lm_head", "q_proj"]},
    "both by LoRA": {"target_modules": ["lm_head", "embed_tokens"]},
    "tied on purpose": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied on purpose, by LoRA": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 4, 20]},
    "neither": {},
}


def loaded(folder: Path) -> torch.nn.Module:
    """transformers takes the directory as it is."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("use", ["peft/merge", "llama/hf-to-hf"])
def test_a_tied_base_answers_as_the_run_did(tmp_path: Path, case: str, use: str) -> None:
    """The truth is the adapter live on its base: peft's own merge of a LoRA on one of two tied weights changes both."""
    base = llama(tie_word_embeddings=True)
    saved(base, tmp_path / "base")
    settings = json.loads(json.dumps(TIED[case]))  # peft adds to its lists
    live = trained(opened(base, tmp_path / "base"), tmp_path / "lora", **settings)(IDS).logits
    first, other = ("adapter", "base") if use == "peft/merge" else ("hf", "adapter")
    paths = {"adapter": tmp_path / "lora", "base": tmp_path / "base", "hf": tmp_path / "base"}
    done = sm.convert(
        paths[first], tmp_path / "out", use=use, bases={other: str(paths[other])}, options=sm.Options(sync=False)
    )
    model = loaded(tmp_path / "out")
    assert (model(IDS).logits - live).abs().max() < 1e-5
    untied = case not in ("neither", "tokens")
    assert model.config.tie_word_embeddings is not untied
    assert ("tie_word_embeddings: false" in " ".join(done.plan.warnings)) is untied


def test_a_head_that_follows_its_embedding_stays_tied(tmp_path: Path) -> None:
    """peft writes both weights and cannot load one; where the copy was left out, the flag says what the head is."""
    base = llama(tie_word_embeddings=True)
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", **json.loads(json.dumps(TIED["tied on purpose"])))
    state = load_file(tmp_path / "lora" / WEIGHTS)
    change_tensors(tmp_path / "lora", {name: None for name in state if "lm_head" in name})
    merge(tmp_path)
    model = loaded(tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, state["base_model.model.model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("owner", ["embedding", "head"])
@pytest.mark.parametrize("case", ["embedding whole", "head by LoRA"])
def test_one_storage_under_two_names_is_two_tensors_then(
    tmp_path: Path, case: str, owner: str, *, tied: bool | None
) -> None:
    """A torch file may hold both names of one storage, whatever config.json says."""
    base = llama(tie_word_embeddings=True)
    saved(base, tmp_path / "base")
    live = trained(opened(base, tmp_path / "base"), tmp_path / "lora", **json.loads(json.dumps(TIED[case])))(IDS).logits
    state = dict(load_file(tmp_path / "base" / "model.safetensors"))
    embedding = state.pop("model.embed_tokens.weight")
    pair = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    pair = pair if owner == "embedding" else dict(reversed(pair.items()))
    torch.save(pair | state, tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text()) | {"tie_word_embeddings": tied}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    merge(tmp_path)
    model = loaded(tmp_path / "out")
    assert (model(IDS).logits - live).abs().max() < 1e-5


@pytest.mark.parametrize("targets", [["wte", "c_attn"], ["lm_head"]])
def test_a_tied_gpt2_too(tmp_path: Path, targets: list[str]) -> None:
    base = gpt2(tie_word_embeddings=True)
    saved(base, tmp_path / "base")
    live = trained(opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=targets)(IDS).logits
    merge(tmp_path)
    assert (loaded(tmp_path / "out")(IDS).logits - live).abs().max() < 1e-5


def test_a_head_of_another_name_is_not_guessed(tmp_path: Path) -> None:
    """BERT ties `cls.predictions.decoder` to its words."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=["word_embeddings", "query"])
    assert "[tied-embeddings]" in refused(tmp_path)


def test_dora_on_a_head_that_was_tied_keeps_its_norm(tmp_path: Path) -> None:
    """Two adapters on one head: the first unties it, the second has the norm of the old one."""
    base = llama(tie_word_embeddings=True)
    saved(base, tmp_path / "base")
    untied = llama()
    untied.load_state_dict(base.state_dict())
    saved(untied, tmp_path / "untied")
    for seed, name in enumerate(("l0", "l1")):
        trained(opened(untied, tmp_path / "untied"), tmp_path / name, seed, target_modules=["lm_head"], use_dora=True)
    found = []
    for folder in ("base", "untied"):
        path = write_mapping(tmp_path, [f"from: {name}, onto: {folder}" for name in ("l0", "l1")], folder, ["l0", "l1"])
        sm.run(path, options=sm.Options(sync=False))
        found.append({name: array.tobytes() for name, array in read_all(sm.inspect(tmp_path / "out")).items()})
        shutil.rmtree(tmp_path / "out")
    assert found[0] == found[1]


def test_ties_of_unknown_names_are_refused(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", modules_to_save=["embed_tokens"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    nested = {"text_config": config, "architectures": ["XForConditionalGeneration"], "tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(nested))
    stderr = refused(tmp_path)
    assert "[tied-embeddings]" in stderr
    assert "embed_tokens" in stderr


def grown(folder: Path, *, tied: bool = False, **settings: object) -> PeftModel:
    """A base of 24 rows, and a run on 28 of them with its tokenizer beside."""
    base = llama(tie_word_embeddings=tied)
    saved(base, folder / "base")
    larger = opened(base, folder / "base")
    torch.manual_seed(3)
    larger.resize_token_embeddings(28, mean_resizing=False)
    model = trained(larger, folder / "lora", **settings)
    for name, text in (("base", "old"), ("lora", "new")):
        (folder / name / "tokenizer.json").write_text(json.dumps({"version": text}))
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    return model


GROWN = {
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "by LoRA": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", GROWN)
def test_a_grown_vocabulary_is_in_the_config_with_its_tokenizer(tmp_path: Path, case: str, *, tied: bool) -> None:
    model = grown(tmp_path, tied=tied, **GROWN[case])
    live = model(IDS + 19).logits  # the new rows are asked for too
    use, bases, source = "peft/merge", {"base": str(tmp_path / "base")}, tmp_path / "lora"
    if tied:
        use, bases, source = "llama/hf-to-hf", {"adapter": str(tmp_path / "lora")}, tmp_path / "base"
    done = sm.convert(source, tmp_path / "out", use=use, bases=bases, options=sm.Options(sync=False))
    said = " ".join(done.plan.warnings)
    assert (loaded(tmp_path / "out")(IDS + 19).logits - live).abs().max() < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 28
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"chat_template": "new"}
    assert "vocab_size: 28" in said
    assert "tokenizer beside the adapter" in said


def test_what_lies_beside_an_adapter_is_taken_or_contradicted_aloud(run: Path) -> None:
    """Processor of the run, and a config.json that says something else than the base's."""
    config = json.loads((run / "base" / "config.json").read_text())
    (run / "lora" / "config.json").write_text(json.dumps(config | {"rope_theta": 5e6, "use_cache": False}))
    (run / "base" / "config.json").write_text(json.dumps(config | {"rope_theta": 1e4}))
    (run / "lora" / "preprocessor_config.json").write_text("{}")
    merge(run)
    said = sm.plan(run / "mapping.yaml").warnings
    assert any("rope_theta 5000000.0" in text for text in said)
    assert not any("use_cache" in text for text in said)
    assert any("preprocessor_config.json" in text for text in said)
    assert (run / "out" / "preprocessor_config.json").is_file()
    assert json.loads((run / "out" / "config.json").read_text())["rope_theta"] == 1e4


def test_a_vocabulary_that_grew_on_one_side_is_refused(tmp_path: Path) -> None:
    grown(tmp_path, modules_to_save=["embed_tokens"])
    state = load_file(tmp_path / "lora" / WEIGHTS)
    change_tensors(tmp_path / "lora", dict.fromkeys(name for name in state if "lm_head" in name))
    stderr = refused(tmp_path)
    assert "[adapter-vocabulary]" in stderr
    assert "vocabulary" in stderr
    assert "28 rows" in stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[0], [23], [3, 4, 5], [20, 2, 9], {"embed_tokens": [7, 1]}, {"lm_head": [5]}])
def test_trained_tokens_replace_their_rows(tmp_path: Path, rows: object, dtype: torch.dtype) -> None:
    base = llama().to(dtype)
    saved(base, tmp_path / "base")
    model = trained(
        type(base).from_pretrained(tmp_path / "base", dtype=dtype), tmp_path / "lora", trainable_token_indices=rows
    )
    found = merge(tmp_path)
    truth = merged_state(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(found[name].astype(np.float32), truth[name].float().numpy())


def test_tokens_of_two_adapters_are_not_guessed(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "l0", trainable_token_indices=[3])
    trained(opened(base, tmp_path / "base"), tmp_path / "l1", trainable_token_indices=[3, 4])
    write_mapping(tmp_path, ["from: l0, onto: base", "from: l1, onto: base"], "base", ["l0", "l1"])
    assert "[adapters-clash]" in refusal(tmp_path)


def test_tokens_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", trainable_token_indices=[3, 4])
    for rows in ([3], [3, 3], [3, 99], None, {"wte": [3, 4]}):
        change_config(tmp_path / "lora", trainable_token_indices=rows)
        assert "trainable_token_indices" in refused(tmp_path)


@pytest.mark.parametrize("labels", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_loads_as_one(tmp_path: Path, labels: int, *, tied: bool) -> None:
    """The base has no head for it; the result is the classifier that the run made."""
    saved(llama(tie_word_embeddings=tied), tmp_path / "base")
    classifier = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels)
    classifier.config.pad_token_id = 0
    model = trained(classifier, tmp_path / "lora", target_modules=["q_proj"], task_type="SEQ_CLS")
    live = model(IDS).logits
    assert_same(merge(tmp_path), merged_state(model))
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again.config.pad_token_id = 0
    assert (again.eval()(IDS).logits - live).abs().max() < 1e-5


def test_another_module_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    """The hint, followed: a base with that module."""
    saved(llama(), tmp_path / "base")
    classifier = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    classifier.config.pad_token_id = 0
    model = trained(classifier, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["score"])
    stderr = refused(tmp_path)
    assert "[adapter-new-module]" in stderr
    assert "score.weight" in stderr
    assert "AutoModelForSequenceClassification" in stderr
    shutil.rmtree(tmp_path / "base")
    torch.manual_seed(0)
    saved(LlamaForSequenceClassification(model.config), tmp_path / "other")
    body = load_file(tmp_path / "other" / "model.safetensors")
    body |= {name: one for name, one in base_state(model).items() if name != "score.weight"}
    save_file(body, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert_same(merge(tmp_path, base="other"), merged_state(model))


def test_single_experts_onto_fused_ones_by_the_route_that_the_error_names(tmp_path: Path) -> None:
    """An adapter of transformers before 5, whose experts were modules, and a base saved as transformers 5 has it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "head_dim": 8}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **counts, num_experts_per_tok=1)).eval()
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    model.save_pretrained(tmp_path / "single")
    state = load_file(tmp_path / "single" / "model.safetensors")
    alike = nn.Module()
    for name, weight in state.items():
        if ".experts." in name:
            placed(alike, name.removesuffix(".weight"), weight)
    adapter = trained(alike, tmp_path / "lora", target_modules=["gate_proj", "up_proj", "down_proj"])
    truth = state | merged_state(adapter)
    said = refused(tmp_path)
    assert "experts fused" in said
    command = re.search(r"`shardmerge convert (\S+) SPLIT --use (\S+)`", said)
    assert command is not None
    sm.convert(command[1], tmp_path / "split", use=command[2], options=sm.Options(sync=False))
    assert_same(merge(tmp_path, base="split"), truth)
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    sm.convert(tmp_path / "out", tmp_path / "fused", use="hf/to-5.0", options=sm.Options(sync=False))
    found = read_all(sm.inspect(tmp_path / "fused"))
    assert_same({name: found[name] for name in again}, again, 0)


def placed(root: nn.Module, path: str, weight: torch.Tensor) -> None:
    """A linear layer at a path, with the modules on the way."""
    *way, last = path.split(".")
    for word in way:
        if not hasattr(root, word):
            root.add_module(word, nn.Module())
        root = getattr(root, word)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    root.add_module(last, layer)
