"""Tiny models of every type whose names changed between versions of transformers.

    python model_generations.py --out DIR [--from DIR ...]

In each version that has it: the model is built (or, with ``--from``, loaded from what an older version saved) and
saved, and its tensors as that version calls them in memory are written beside it, into memory.safetensors. Every value
is drawn once, so that a tensor is known by its bytes whatever it is called. What 5.x saves of a model that was built
from a config is called otherwise again: fresh.safetensors. report.json says what is to be known besides: where the
parts of a model are, and from 5.0 on how transformers' own tables fuse experts.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import re
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # tests that want the list alone need not wait for it

TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
QWEN_EYE = {"depth": 2, "num_heads": 5, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_25_EYE = {**QWEN_EYE, "hidden_size": 20, "intermediate_size": 36, "out_hidden_size": 24}
QWEN_IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
MROPE = {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 0]}}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CLIP = {"model_type": "clip_vision_model", **EYE, "projection_dim": 16}
SIGLIP = {"model_type": "siglip_vision_model", **EYE}
PIXTRAL = {"model_type": "pixtral", **EYE, "head_dim": 4}
LLAMA = {"model_type": "llama", **TEXT, "rope_theta": 5000.0}
MISTRAL = {"model_type": "mistral", **TEXT, "head_dim": 4, "rope_theta": 5000.0}
QWEN2 = {"model_type": "qwen2", **TEXT, "rope_theta": 5000.0}
DEEPSEEK = {
    **TEXT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 6,
    "q_lora_rank": 10, "kv_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "first_k_dense_replace": 1,
}  # fmt: skip
PINS = {"image_token_index": 9, "image_grid_pinpoints": [[28, 56]], "tie_word_embeddings": False}

# Case: class, model type, config. The case that is called like the model type is the one that its table is read from.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip_vision_model": ("CLIPVisionModel", "clip_vision_model", CLIP),
    "siglip_vision_model": ("SiglipVisionModel", "siglip_vision_model", SIGLIP),
    "llava": (
        "LlavaForConditionalGeneration", "llava", {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 9},
    ),
    "llava-pixtral": (
        "LlavaForConditionalGeneration", "llava",
        {"text_config": MISTRAL, "vision_config": PIXTRAL, "image_token_index": 9, "vision_feature_layer": -1,
         "vision_feature_select_strategy": "full"},
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration", "llava_next", {**PINS, "text_config": LLAMA, "vision_config": CLIP},
    ),
    "llava_next-mixtral": (
        "LlavaNextForConditionalGeneration", "llava_next",
        {**PINS, "text_config": {"model_type": "mixtral", **TEXT, "num_local_experts": 4}, "vision_config": CLIP},
    ),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration", "llava_onevision",
        {**PINS, "text_config": QWEN2, "vision_config": {**SIGLIP, "vision_use_head": False}},
    ),
    "llava_next_video": (
        "LlavaNextVideoForConditionalGeneration", "llava_next_video",
        {**PINS, "text_config": LLAMA, "vision_config": CLIP, "video_token_index": 8},
    ),
    "vipllava": (
        "VipLlavaForConditionalGeneration", "vipllava",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 9, "vision_feature_layers": [-1, -2]},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration", "gemma3",
        {"text_config": {**TEXT, "head_dim": 8, "tie_word_embeddings": False}, "tie_word_embeddings": False,
         "vision_config": {**EYE, "vision_use_head": False}, "mm_tokens_per_image": 4},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration", "paligemma",
        {"text_config": {"model_type": "gemma", **TEXT, "head_dim": 8, "tie_word_embeddings": False},
         "image_token_index": 9, "projection_dim": 24, "tie_word_embeddings": False,
         "vision_config": {**SIGLIP, "projection_dim": 24, "vision_use_head": False}},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration", "mistral3",
        {"text_config": {**MISTRAL, "tie_word_embeddings": False}, "vision_config": PIXTRAL, "image_token_index": 9,
         "vision_feature_layer": -1, "tie_word_embeddings": False},
    ),
    "internvl": (
        "InternVLForConditionalGeneration", "internvl",
        {"text_config": {**QWEN2, "tie_word_embeddings": False}, "image_token_id": 9, "tie_word_embeddings": False,
         "vision_config": {**EYE, "image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": True,
                           "attention_bias": True}},
    ),
    "mllama": (
        "MllamaForConditionalGeneration", "mllama",
        {"text_config": {**TEXT, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"},
                         "rope_theta": 5000.0},
         "vision_config": {"hidden_size": 20, "attention_heads": 5, "num_hidden_layers": 2, "num_global_layers": 1,
                           "intermediate_size": 36, "image_size": 28, "patch_size": 7, "vision_output_dim": 40,
                           "intermediate_layers_indices": [0], "max_num_tiles": 2,
                           "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
         "image_token_index": 9},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration", "qwen2_vl",
        {**TEXT, **MROPE, **QWEN_IDS, "rope_theta": 5000.0, "tie_word_embeddings": False,
         "vision_config": {**QWEN_EYE, "embed_dim": 20, "hidden_size": 24}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl",
        {**TEXT, **MROPE, **QWEN_IDS, "rope_theta": 5000.0, "tie_word_embeddings": False,
         "vision_config": {**QWEN_25_EYE, "fullatt_block_indexes": [1], "window_size": 28}},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration", "qwen3_vl",
        {**QWEN_IDS, "tie_word_embeddings": False,
         "text_config": {**TEXT, "head_dim": 4, "rope_theta": 5000.0,
                         "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
         "vision_config": {**QWEN_25_EYE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    ),
    "mixtral": ("MixtralForCausalLM", "mixtral", {**TEXT, "num_local_experts": 4, "rope_theta": 5000.0}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "qwen2_moe",
        {**TEXT, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "qwen3_moe",
        {**TEXT, **EXPERTS, "num_experts": 5, "head_dim": 4, "mlp_only_layers": [1], "rope_theta": 5000.0},
    ),
    "olmoe": ("OlmoeForCausalLM", "olmoe", {**TEXT, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "deepseek_v3", {**DEEPSEEK, "attention_bias": True}),
    "llama": ("LlamaForCausalLM", "llama", {**TEXT, "rope_theta": 5000.0}),
}  # fmt: skip


def build(name: str) -> PreTrainedModel | None:
    """Returns the model with random weights, None where this version has no such class."""
    import torch
    import transformers

    class_name, model_type, config = MODELS[name]
    cls = getattr(transformers, class_name, None)
    if cls is None:
        return None
    torch.manual_seed(sorted(MODELS).index(name))
    model: PreTrainedModel = cls(
        transformers.AutoConfig.for_model(**{**copy.deepcopy(config), "model_type": model_type})
    )
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.05)
    return model


def load(name: str, folder: pathlib.Path) -> PreTrainedModel | None:
    """Returns the model of a directory, None where this version has no such class."""
    import transformers

    cls = getattr(transformers, MODELS[name][0], None)
    if cls is None:
        return None
    model, said = cls.from_pretrained(folder, output_loading_info=True)
    if any(said.values()):  # 5.0.0 cannot load a Mixtral inside of a LLaVA
        print(f"LEFT OUT: transformers {transformers.__version__} does not load its own {name}")
        return None
    loaded: PreTrainedModel = model
    return loaded


def save_fresh(model: PreTrainedModel, out: pathlib.Path) -> None:
    """Writes what a model with these weights saves that was not loaded from a file."""
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as scratch:
        fresh.save_pretrained(scratch)
        shutil.copy(pathlib.Path(scratch) / "model.safetensors", out / "fresh.safetensors")


def parts(model: PreTrainedModel) -> dict[str, str]:
    """Returns the prefix in memory of each model inside of the model, by its key in the config."""
    from transformers import PreTrainedModel

    found = {}
    for path, module in model.named_modules():
        for key in ("text_config", "vision_config"):
            if path and isinstance(module, PreTrainedModel) and module.config is getattr(model.config, key, None):
                found.setdefault(key, f"{path}.")
    return found


def experts(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Returns how the tables of this version make one tensor of many: source and target patterns, and ops."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return []
    return [
        {"each": one.source_patterns, "fused": one.target_patterns,
         "operations": [[type(op).__name__, getattr(op, "dim", None)] for op in one.operations]}
        for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)
    ]  # fmt: skip


def renamed_types() -> list[str]:
    """Returns the model types that this version has a table for, under the type or one of its classes."""
    import transformers

    if transformers.__version__ < "5":  # a table in the class; folders are called as types are
        models = pathlib.Path(transformers.__file__).parent / "models"
        filled = re.compile(r"_checkpoint_conversion_mapping = \{\s*[\"'r]")
        return sorted({path.parent.name for path in models.glob("*/modeling_*.py") if filled.search(path.read_text())})
    from transformers import conversion_mapping
    from transformers.models.auto import modeling_auto

    known = set(conversion_mapping._build_checkpoint_conversion_mapping()) - {"legacy"}
    found = {name for name in known if name == name.lower()}
    for mapping in (value for key, value in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES")):
        for model_type, classes in mapping.items():
            if known & {classes, *(classes if isinstance(classes, tuple | list) else ())}:
                found.add(model_type)
    return sorted(found)


def main() -> None:
    """Makes every model that this version has."""
    import transformers
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--from", dest="older", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=list(MODELS))
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    report: dict[str, Any] = {}
    for name in given.only:
        folder = next((one / name for one in given.older if (one / name).exists()), None)
        model = load(name, folder) if folder else build(name)
        if model is None:
            continue
        out = given.out / name
        model.save_pretrained(out)
        state = {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}
        save_file(state, out / "memory.safetensors", metadata={"format": "pt"})
        if folder and transformers.__version__ >= "5":
            save_fresh(model, out)
        report[name] = {"parts": parts(model), "experts": experts(model), "from": str(folder or "")}
    report["renamed_types"] = renamed_types()
    (given.out / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
