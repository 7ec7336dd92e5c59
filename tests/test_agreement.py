"""A config.json and the tensors beside it describe one model, or nothing is published. The oracle is transformers: the
names and shapes that its own classes have with a config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.errors import ShardmergeError
from shardmerge.targets.agreement import Described, disagreements
from shardmerge.tensors import Shape

transformers = pytest.importorskip("transformers")

Config = dict[str, object]

# Sizes of which no two are alike and no multiple is another's neighbour: a size read at a wrong place is seen.
_TEXT = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64,
}  # fmt: skip
_EYE = {
    "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
_CLIP_TEXT = {
    "hidden_size": 15, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 5, "vocab_size": 33,
    "max_position_embeddings": 17,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 6, "q_lora_rank": 10,
    "kv_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1,
}  # fmt: skip
_LLAVA = {
    "text_config": {"model_type": "llama", **_TEXT},
    "vision_config": {"model_type": "clip_vision_model", **_EYE},
    "image_token_index": 7,
    "vision_feature_layer": -2,
    "tie_word_embeddings": False,
}
_INTERN_EYE = {"model_type": "internvl_vision", **_EYE, "image_size": [28, 28], "patch_size": [7, 7]}
_INTERN_EYE |= {"attention_bias": True, "use_qk_norm": False}
TINY: dict[str, tuple[str, Config]] = {
    "LlamaForCausalLM": ("LlamaConfig", {**_TEXT}),
    "LlamaForCausalLM with head_dim": ("LlamaConfig", {**_TEXT, "head_dim": 8, "attention_bias": True}),
    "LlamaModel": ("LlamaConfig", {**_TEXT, "mlp_bias": True}),
    "LlamaForSequenceClassification": ("LlamaConfig", {**_TEXT, "num_labels": 4}),
    "LlamaForTokenClassification": ("LlamaConfig", {**_TEXT, "num_labels": 4}),
    "MistralForCausalLM": ("MistralConfig", {**_TEXT, "head_dim": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", {**_TEXT}),
    "CLIPModel": ("CLIPConfig", {"text_config": _CLIP_TEXT, "vision_config": _EYE, "projection_dim": 13}),
    "CLIPVisionModel": ("CLIPVisionConfig", {**_EYE}),
    "CLIPTextModel": ("CLIPTextConfig", {**_CLIP_TEXT}),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {**_EYE, "projection_dim": 13}),
    "CLIPTextModelWithProjection": ("CLIPTextConfig", {**_CLIP_TEXT, "projection_dim": 13}),
    "MixtralForCausalLM": ("MixtralConfig", {**_TEXT, "num_local_experts": 3}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**_TEXT, "head_dim": 8, **_EXPERTS, "num_experts": 3}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {**_TEXT, **_EXPERTS, **_DEEPSEEK}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**_TEXT, "head_dim": 8, "tie_word_embeddings": False}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**_TEXT, "head_dim": 8, "tie_word_embeddings": False}),
    "Phi3ForCausalLM": ("Phi3Config", {**_TEXT, "pad_token_id": 0}),
    "GraniteForCausalLM": ("GraniteConfig", {**_TEXT}),
    "Olmo2ForCausalLM": ("Olmo2Config", {**_TEXT}),
    "SiglipModel": ("SiglipConfig", {"text_config": _CLIP_TEXT, "vision_config": _EYE}),
    "Siglip2VisionModel": ("Siglip2VisionConfig", {**_EYE, "num_patches": 9}),
    "Dinov2ForImageClassification": ("Dinov2Config", {**_EYE, "num_labels": 4}),
    "LlavaForConditionalGeneration": ("LlavaConfig", _LLAVA),
    "LlavaNextForConditionalGeneration": ("LlavaNextConfig", {**_LLAVA, "image_grid_pinpoints": [[28, 56]]}),
    "InternVLForConditionalGeneration": (
        "InternVLConfig",
        {"text_config": {"model_type": "qwen2", **_TEXT}, "vision_config": _INTERN_EYE, "tie_word_embeddings": False},
    ),
}


# Ids, rope and lists of resolutions are no sizes; a tie shows in values (below); the rest is what every config has and
# no model of these reads when it is made.
_NO_SIZES = (
    "token_id", "token_index", "rope", "tie_word", "image_grid", "return_dict", "output_", "is_encoder_decoder",
    "chunk_size", "use_cache", "problem_type", "pretraining_tp",
)  # fmt: skip


def real_shapes(kind: str, config: Config) -> dict[str, Shape] | None:
    """Returns the names and shapes of the real class, None where the library refuses the config."""
    config_class = getattr(transformers, TINY[kind][0])
    try:
        with torch.device("meta"):
            model = getattr(transformers, kind.split(maxsplit=1)[0])(config_class.from_dict(deepcopy(config)))
    except Exception:  # noqa: BLE001  # whatever its validation raises
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tiny(kind: str) -> Config:
    """Returns the config.json of a tiny model, all of its defaults spelt out."""
    name, values = TINY[kind]
    config = getattr(transformers, name)(**deepcopy(values))
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [kind.split(maxsplit=1)[0]]}


def changes(config: Mapping[str, object], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Config]]:
    """Yields the config with each number changed by one, both ways, and each switch turned; lists as a whole."""
    for key, value in config.items():
        if any(word in key for word in _NO_SIZES):
            continue
        if isinstance(value, dict) and key != "id2label":
            for name, changed in changes(value, (*path, key)):
                yield f"{key}.{name}", {**config, key: changed}
        elif isinstance(value, bool):
            yield key, {**config, key: not value}
        elif isinstance(value, int):
            steps = (1,) if path else (1, -1)  # the parts are tested both ways where they are models of their own
            yield from ((f"{key}{step:+}", {**config, key: value + step}) for step in steps)
        elif isinstance(value, list) and value and all(type(item) is int for item in value):
            yield f"{key}+1", {**config, key: [item + 1 for item in value]}


@pytest.mark.parametrize("kind", TINY)
def test_the_real_model_agrees_with_its_config(kind: str) -> None:
    config = tiny(kind)
    shapes = real_shapes(kind, config)
    assert shapes
    assert disagreements(Described(config, "config.json", shapes)) == ()


@pytest.mark.parametrize("kind", TINY)
def test_every_number_and_switch_changed_by_one_is_refused_or_no_tensor_shows_it(kind: str) -> None:
    """Whether a key shows in the weights is not our opinion: the real class is made with the changed config."""
    config = tiny(kind)
    shapes = real_shapes(kind, config)
    assert shapes
    shown, wrong = [], []
    for change, changed in changes(config):
        other = real_shapes(kind, changed)
        refused = bool(disagreements(Described(changed, "config.json", shapes)))
        if other is not None and refused != (other != shapes):
            wrong.append((change, "refused" if refused else "accepted"))
        if other is not None and other != shapes:
            shown.append(change)
    assert wrong == []
    assert len(shown) >= 5, shown  # the sizes of the smallest class


# ---- the same through `convert`, and through a target of the mapping


def directory(folder: Path, config: Config, shapes: Mapping[str, Shape]) -> Path:
    """Writes a checkpoint with these shapes, every tensor other values."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan_error(source: Path, config: Config, mapping: str = "") -> ShardmergeError | None:
    """Returns why the plan of a conversion is refused, with another config.json beside the weights."""
    (source / "config.json").write_text(json.dumps(config))
    try:
        if mapping:
            path = source.parent / "mapping.yaml"
            path.write_text(mapping)
            sm.plan(path)
        else:
            api.prepare_conversion(source)
    except ShardmergeError as error:
        return error
    return None


def rename(target: str, name: str = "a") -> str:
    """Returns a mapping that keeps every name."""
    rule = f'tensors: {{"{{rest...}}": "{name}:{{rest...}}"}}'
    return f"shardmerge: 1\nsources: {{{name}: {name}}}\noutput: out\ntarget: {target}\n{rule}\n"


TARGETS = {
    "LlamaForCausalLM": "{name: hf/llama, text: a}",
    "MistralForCausalLM": "{name: hf/llama, text: a}",
    "Qwen2ForCausalLM": "{name: hf/llama, text: a}",
    "CLIPModel": "{name: hf/clip, config: a}",
}


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "CLIPModel", "LlavaForConditionalGeneration"])
@pytest.mark.parametrize("way", ["convert", "hf/model"])
def test_convert_and_hf_model_refuse_what_the_weights_show(kind: str, way: str, tmp_path: Path) -> None:
    config = tiny(kind)
    shapes = real_shapes(kind, config)
    assert shapes
    source = directory(tmp_path / "a", config, shapes)
    mapping = rename("{name: hf/model, text: a}") if way == "hf/model" else ""
    assert plan_error(source, config, mapping) is None
    for change, changed in changes(config):
        other = real_shapes(kind, changed)
        if other is not None:
            assert (plan_error(source, changed, mapping) is not None) == (other != shapes), change


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_refuse_what_the_weights_show(kind: str, tmp_path: Path) -> None:
    config = tiny(kind)
    shapes = real_shapes(kind, config)
    assert shapes
    source = directory(tmp_path / "a", config, shapes)
    mapping = rename(TARGETS[kind])
    assert plan_error(source, config, mapping) is None
    for change, changed in changes(config):
        other = real_shapes(kind, changed)
        if other is not None and other != shapes:
            assert plan_error(source, changed, mapping) is not None, change
