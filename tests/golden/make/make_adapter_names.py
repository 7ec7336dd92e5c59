"""Adapters of vision models by peft, trained on the names that each version of transformers has in memory.

    python make_adapter_names.py base OUT     with the oldest version: a base a kind, as save_pretrained writes it
    python make_adapter_names.py lora OUT     with each version: an adapter a kind, and what peft merges, by the base's names

OUT/<kind>/base/                     config.json and model.safetensors
OUT/<kind>/<version>/                adapter_config.json and adapter_model.safetensors, as peft saves them
OUT/<kind>/<version>/truth.safetensors   the weights that the adapter changed, merged by peft, under the names of the base

Which tensor of the base a weight in memory is, is told by its value: every tensor of a base has values of its own.
A second run of `base` with a newer version adds the kinds that the older one does not have.
"""

from __future__ import annotations

import json
import pathlib
import sys

import peft
import torch
import transformers as tf
from layouts import randomize
from safetensors.torch import load_file, save_file

TEXT = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EYE = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_EYE = {"depth": 2, "num_heads": 2, "patch_size": 14}
IDS = {"image_token_id": 23, "video_token_id": 22, "vision_start_token_id": 21, "vision_end_token_id": 20}
MROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 0]}

# By kind: class, config class, its arguments, and target_modules of the adapter.
KINDS = {
    "llava": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": EYE | {"model_type": "clip_vision_model"}},
        ["q_proj", "v_proj", "linear_1", "lm_head"],
    ),
    # Text and vision of one width: shapes cannot tell them apart.
    "llava_alike": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama", "num_key_value_heads": 4},
            "vision_config": EYE | {"model_type": "clip_vision_model", "hidden_size": 16},
        },
        ["q_proj", "v_proj"],
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration", "LlavaNextConfig",
        {
            "text_config": TEXT | {"model_type": "mistral"}, "vision_config": EYE | {"model_type": "clip_vision_model"},
            "image_grid_pinpoints": [[28, 56]],
        },
        r".*language_model.*\.(q_proj|down_proj)",
    ),
    "onevision": (
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig",
        {
            "text_config": TEXT | {"model_type": "qwen2"}, "vision_config": EYE | {"model_type": "siglip_vision_model"},
            "image_grid_pinpoints": [[28, 56]],
        },
        ["q_proj", "o_proj", "out_proj", "linear_2"],
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {
            "text_config": TEXT | {"model_type": "gemma3_text", "query_pre_attn_scalar": 4, "sliding_window": 8},
            "vision_config": EYE | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
        },
        ["q_proj", "v_proj"],
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
        {
            "text_config": TEXT | {"model_type": "gemma"}, "projection_dim": 16,
            "vision_config": EYE | {"model_type": "siglip_vision_model", "projection_dim": 16},
        },
        ["q_proj", "linear"],
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration", "Mistral3Config",
        {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": EYE | {"model_type": "pixtral", "head_dim": 6}},
        ["q_proj", "linear_1"],
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {key: value for key, value in TEXT.items() if key != "head_dim"} | IDS | {
            "rope_scaling": MROPE, "vision_config": QWEN_EYE | {"embed_dim": 12, "hidden_size": 16, "mlp_ratio": 2},
        },
        ["q_proj", "qkv"],
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {key: value for key, value in TEXT.items() if key != "head_dim"} | IDS | {
            "rope_scaling": MROPE,
            "vision_config": QWEN_EYE | {
                "hidden_size": 12, "out_hidden_size": 16, "intermediate_size": 20, "fullatt_block_indexes": [1],
            },
        },
        ["q_proj", "qkv", "lm_head"],
    ),
    "mllama": (
        "MllamaForConditionalGeneration", "MllamaConfig",
        {
            "text_config": TEXT | {
                "model_type": "mllama_text_model", "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"},
            },
            "vision_config": EYE | {
                "model_type": "mllama_vision_model", "num_global_layers": 1, "attention_heads": 2,
                "vision_output_dim": 24, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
                "max_num_tiles": 1,
            },
        },
        ["q_proj", "v_proj"],
    ),
    "internvl": (
        "InternVLForConditionalGeneration", "InternVLConfig",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": EYE | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
        },
        ["q_proj", "v_proj", "linear_1"],
    ),
}  # fmt: skip


def bases(out: pathlib.Path) -> None:
    for kind, (model_class, config_class, settings, _) in KINDS.items():
        if (out / kind).exists() or not hasattr(tf, model_class):
            continue
        more = {"image_token_index": 23} if "image_token_id" not in settings else {}
        model = getattr(tf, model_class)(getattr(tf, config_class)(**settings, **more))
        randomize(model, kind)
        model.to(torch.bfloat16).save_pretrained(out / kind / "base")
        for path in (out / kind / "base").iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()


def adapters(out: pathlib.Path) -> None:
    for kind, (model_class, _, _, targets) in KINDS.items():
        if not hasattr(tf, model_class):
            continue
        folder = out / kind / tf.__version__
        model = getattr(tf, model_class).from_pretrained(out / kind / "base", torch_dtype=torch.float32)
        on_disk = {value(one): name for name, one in load_file(out / kind / "base" / "model.safetensors").items()}
        before = {name: value(one) for name, one in model.state_dict().items()}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        randomize_trained(wrapped, kind)
        wrapped.save_pretrained(folder)
        (folder / "README.md").unlink()
        merged = wrapped.merge_and_unload().state_dict()
        assert set(merged) == set(before)
        changed = {name: one for name, one in merged.items() if value(one) != before[name]}
        assert changed
        truth = {on_disk[before[name]]: one.contiguous() for name, one in changed.items()}
        save_file(truth, folder / "truth.safetensors")
        print(kind, tf.__version__, len(truth), json.dumps(sorted(changed)[0]))


def value(tensor: torch.Tensor) -> bytes:
    return tensor.detach().float().contiguous().numpy().tobytes()


def randomize_trained(model: torch.nn.Module, salt: str) -> None:
    generator = torch.Generator().manual_seed(len(salt))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


if __name__ == "__main__":
    {"base": bases, "lora": adapters}[sys.argv[1]](pathlib.Path(sys.argv[2]))
