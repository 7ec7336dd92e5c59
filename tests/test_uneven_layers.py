"""A layer or an expert without what all its fellows have is incomplete; layers that differ by design are not."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch

from shardmerge.targets.agreement import Described, disagreements
from shardmerge.tensors import Shape
from tests.families import EYE, FAMILIES, QFORMER

transformers = pytest.importorskip("transformers")


def real(kind: str, **sizes: Any) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Returns config.json, names and shapes of a class with other sizes."""
    model_type, values = FAMILIES[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**deepcopy(values), **sizes})
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {**json.loads(model.config.to_json_string()), "architectures": [kind]}, shapes


@pytest.mark.parametrize(
    ("kind", "key", "layer"),
    [
        ("GPT2LMHeadModel", "n_layer", "transformer.h.2."),
        ("Qwen3ForCausalLM", "num_hidden_layers", "model.layers.3."),
        ("OPTForCausalLM", "num_hidden_layers", "model.decoder.layers.1."),
        ("BertForMaskedLM", "num_hidden_layers", "bert.encoder.layer.2."),
        ("T5ForConditionalGeneration", "num_layers", "encoder.block.2."),
        ("ViTForImageClassification", "num_hidden_layers", "vit."),
        ("MambaForCausalLM", "num_hidden_layers", "backbone.layers.3."),
        ("DeepseekV3ForCausalLM", "num_hidden_layers", "model.layers.3."),
    ],
)
def test_each_tensor_of_a_layer_is_missed(kind: str, key: str, layer: str) -> None:
    config, shapes = real(kind, **{key: 5})
    assert disagreements(Described(config, "config.json", shapes)) == ()
    inside = [name for name in shapes if name.startswith(layer)]
    if kind.startswith("ViT"):
        inside = [name for name in inside if ".2." in name]
    assert len(inside) >= 7
    for gone in inside:
        fewer = {name: shape for name, shape in shapes.items() if name != gone}
        (error,) = disagreements(Described(config, "config.json", fewer))
        assert error.code == "incomplete-model"
        assert gone in error.what
        assert "--partial" in error.hint


@pytest.mark.parametrize("number", range(3))
def test_an_expert_is_missed_wherever_it_is(number: int) -> None:
    names = [f"model.layers.0.mlp.experts.{expert}.{part}.weight" for expert in range(3) for part in ("up", "down")]
    gone = f"model.layers.0.mlp.experts.{number}.up.weight"
    (error,) = disagreements(Described({}, "config.json", {name: (4, 4) for name in names if name != gone}))
    assert gone in error.what


# Layers that are not alike: every second one attends to an image, the first has no norm, some are dense, some convolve,
# some have no attention, the last does not make the image smaller.
_MIXED: dict[str, dict[str, Any]] = {
    "ModernBertForMaskedLM": {"num_hidden_layers": 5},
    "T5ForConditionalGeneration": {"num_layers": 5, "num_decoder_layers": 5},
    "JambaForCausalLM": {"num_hidden_layers": 7, "attn_layer_period": 4, "attn_layer_offset": 2},
    "DeepseekV3ForCausalLM": {"num_hidden_layers": 5, "first_k_dense_replace": 3},
    "Qwen3MoeForCausalLM": {"num_hidden_layers": 5, "mlp_only_layers": [2]},
    "Gemma3ForCausalLM": {"num_hidden_layers": 7},
    "RwkvForCausalLM": {"num_hidden_layers": 5},
    "GPTNeoForCausalLM": {"num_layers": 5, "attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "SwinModel": {"depths": [1, 1, 2, 1, 1], "num_heads": [2, 2, 2, 2, 2], "image_size": 64},
    "Blip2ForConditionalGeneration": {
        "qformer_config": {**QFORMER, "num_hidden_layers": 5},
        "vision_config": {**EYE, "num_hidden_layers": 5},
    },
}


@pytest.mark.parametrize("kind", _MIXED)
def test_layers_may_differ_by_design(kind: str) -> None:
    config, shapes = real(kind, **_MIXED[kind])
    assert disagreements(Described(config, "config.json", shapes)) == ()


def test_the_middle_one_of_three_may_be_another_kind() -> None:
    sizes = {"qformer_config": {**QFORMER, "num_hidden_layers": 3}}  # every second layer attends to the image
    config, shapes = real("Blip2ForConditionalGeneration", **sizes)
    assert disagreements(Described(config, "config.json", shapes)) == ()


def test_where_no_kind_is_usual_nothing_is_missed() -> None:
    """Architecture search leaves layers without attention, without an MLP, with one of several norms (DeciLM)."""
    parts = ("ab", "abc", "ad", "a", "ae", "abc")  # of each layer
    shapes: dict[str, Shape] = {f"layers.{n}.{part}.weight": (4,) for n, own in enumerate(parts) for part in own}
    assert disagreements(Described({}, "config.json", shapes)) == ()


def test_what_is_left_unquantized_is_not_missed() -> None:
    """compressed-tensors and fp8 list modules to ignore: those have no scales."""
    names = [f"model.layers.{layer}.mlp.up_proj.{part}" for layer in range(6) for part in ("weight", "weight_scale")]
    shapes: dict[str, Shape] = {name: (4,) for name in names if name != "model.layers.3.mlp.up_proj.weight_scale"}
    assert disagreements(Described({"quantization_config": {}}, "config.json", shapes)) == ()
    assert disagreements(Described({}, "config.json", shapes, packed=True)) == ()
    assert disagreements(Described({}, "config.json", shapes))
