"""Configs of architectures that are not known by name: the real model is not complained of, a wrong number is."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch

from shardmerge.targets.agreement import Described, disagreements
from shardmerge.tensors import Shape

transformers = pytest.importorskip("transformers")

_TEXT = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_BERT = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}
_EYE = {"hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 5, "depth": 2}
# Class, config class, sizes, and the keys whose change by one must be seen.
_SEEN = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads")
_EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "Qwen3ForCausalLM": ("Qwen3Config", {**_TEXT, "head_dim": 8}, _SEEN),
    "Gemma2ForCausalLM": ("Gemma2Config", {**_TEXT, "head_dim": 8}, _SEEN[:4]),
    "Phi3ForCausalLM": ("Phi3Config", {**_TEXT}, _SEEN[:3]),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 6},
        ("n_layer", "vocab_size", "n_embd"),
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**_BERT}, _SEEN[:3]),
    "OPTForCausalLM": ("OPTConfig", {**_BERT, "ffn_dim": 40, "word_embed_proj_dim": 24}, _SEEN[:2]),
    "MixtralForCausalLM": ("MixtralConfig", {**_TEXT, "num_local_experts": 4}, (*_SEEN[:3], "num_local_experts")),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**_TEXT, **_EXPERTS, "num_experts": 5},
        (*_SEEN[:3], "num_local_experts"),
    ),
    "BertForMaskedLM": ("BertConfig", {**_BERT}, _SEEN[:4]),
    "BertForSequenceClassification": ("BertConfig", {**_BERT}, _SEEN[:4]),
    "ModernBertForMaskedLM": ("ModernBertConfig", {**_BERT}, _SEEN[:3]),
    "AlbertForMaskedLM": ("AlbertConfig", {**_BERT, "embedding_size": 12}, ("vocab_size", "embedding_size")),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 50, "d_model": 24, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6,
         "d_kv": 4},
        ("vocab_size", "num_decoder_layers"),
    ),
    "BartForConditionalGeneration": (
        "BartConfig",
        {"vocab_size": 50, "d_model": 24, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 6,
         "decoder_attention_heads": 6, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40},
        ("vocab_size", "encoder_layers", "decoder_layers", "d_model"),
    ),
    "Qwen3ForSequenceClassification": ("Qwen3Config", {**_TEXT, "head_dim": 8}, _SEEN),
    "ViTForImageClassification": ("ViTConfig", {**_EYE, "image_size": 28, "patch_size": 7}, ()),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {"text_config": {**_TEXT, "head_dim": 8}, "vision_config": {**_EYE, "image_size": 28, "patch_size": 7},
         "mm_tokens_per_image": 4},
        ("text_config.num_hidden_layers", "text_config.vocab_size", "vision_config.num_hidden_layers"),
    ),
}  # fmt: skip


def real(kind: str) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Returns the config.json of a tiny model and its names and shapes."""
    name, values, _ = MODELS[kind]
    config = getattr(transformers, name)(**deepcopy(values))
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return {**json.loads(model.config.to_json_string()), "architectures": [kind]}, shapes


def changed(config: dict[str, Any], key: str, step: int) -> dict[str, Any]:
    result = deepcopy(config)
    place = result
    *outer, last = key.split(".")
    for name in outer:
        place = place[name]
    place[last] += step
    return result


@pytest.mark.parametrize("kind", MODELS)
def test_a_real_model_is_let_through_and_a_wrong_number_is_not(kind: str) -> None:
    config, shapes = real(kind)
    assert disagreements(Described(config, "config.json", shapes)) == ()
    for key in MODELS[kind][2]:
        for step in (1, -1):
            errors = disagreements(Described(changed(config, key, step), "config.json", shapes))
            assert any(key in error.expected for error in errors), (key, step, errors)
            assert all(error.hint for error in errors)


@pytest.mark.parametrize("kind", MODELS)
def test_a_config_that_says_nothing_claims_nothing(kind: str) -> None:
    """Neither an empty config, nor tensors of another library, nor keys of another kind than numbers."""
    _, shapes = real(kind)
    odd = {
        "vocab_size": None,
        "layer_types": {},
        "num_experts": [4],
        "architectures": [3],
    }
    for config in ({}, {"model_type": "mine"}, odd):
        assert disagreements(Described(config, "config.json", shapes)) == ()
    (error,) = disagreements(Described({"num_hidden_layers": "three"}, "config.json", shapes))
    assert (error.code, "num_hidden_layers" in error.what) == ("odd-config", True)
    other = {"num_hidden_layers": 7, "vocab_size": 9, "hidden_size": 5}
    assert disagreements(Described(other, "config.json", {"weights.blob": (4, 4), "x": ()})) == ()


def test_packed_weights_claim_no_sizes() -> None:
    config, shapes = real("Qwen3ForCausalLM")
    packed = {name: (shape[0] * shape[-1] // 2, 1) if "proj" in name else shape for name, shape in shapes.items()}
    quantized = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
    assert disagreements(Described(quantized, "config.json", packed)) == ()
    fewer = changed(quantized, "num_hidden_layers", 1)
    assert disagreements(Described(fewer, "config.json", packed))[0].code == "incomplete-model"


def test_a_list_of_layers_has_an_item_a_layer() -> None:
    config, shapes = real("Qwen3ForCausalLM")
    config["layer_types"] = ["full_attention"] * 2
    (error,) = disagreements(Described(config, "config.json", shapes))
    assert "layer_types" in error.expected


def test_layers_with_a_gap() -> None:
    config, shapes = real("GPT2LMHeadModel")
    gap = {name.replace(".h.1.", ".h.7."): shape for name, shape in shapes.items()}
    (error,) = disagreements(Described(config, "config.json", gap))
    assert error.code == "incomplete-model"
    assert "transformer.h.1 is not" in error.found


def test_depth_counts_the_blocks_of_an_encoder_alone() -> None:
    """Qwen2-VL's says how many blocks there are; Janus's how deep the projector behind its layers is."""
    config = {"vision_config": {"depth": 2, "num_hidden_layers": 3}}
    layers: dict[str, Shape] = {f"model.vision_model.encoder.layers.{n}.norm.weight": (4,) for n in range(3)}
    assert disagreements(Described(config, "config.json", layers)) == ()
    ocr: dict[str, Shape] = {f"backbone.encoder.blocks.{n}.norm.weight": (4,) for n in range(3)}  # PP-OCRv5: its neck
    assert disagreements(Described({"depth": 2}, "config.json", ocr)) == ()
    blocks: dict[str, Shape] = {f"model.visual.blocks.{n}.norm.weight": (4,) for n in range(3)}
    (error,) = disagreements(Described({"vision_config": {"depth": 2}}, "config.json", blocks))
    assert "vision_config.depth 2" in error.expected


def test_a_hostile_config_is_bounded() -> None:
    nested: dict[str, Any] = {"num_hidden_layers": 10**4000, "vocab_size": -1}
    for _ in range(50):
        nested = {"text_config": nested, "num_hidden_layers": 10**4000, "vocab_size": 10**30, "hidden_size": 0}
    shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 4), "model.embed_tokens.weight": (3, 4)}
    errors = disagreements(Described(nested, "config.json", shapes))
    assert errors
    assert all(len(str(error)) < 3000 for error in errors)
