"""open_clip's ``open_clip_config.json`` (or a model config of its package) as the config.json of a CLIPModel.

Field names and defaults follow ``CLIPVisionCfg`` and ``CLIPTextCfg`` of ``open_clip/model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.targets.architectures import JsonObject, dimension, finite, layers

PREPROCESSING = "_preprocessing"

# Any of these makes another model than CLIP's: their neutral value, which is also the default.
_NEUTRAL: Mapping[str, object] = {
    "timm_model_name": None, "hf_model_name": None, "ls_init_value": None, "attentional_pool": False,
    "no_ln_pre": False, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn": False,
    "scale_attn_inner": False, "scale_fc": False, "embed_cls": False, "proj_bias": False, "no_causal_mask": False,
}  # fmt: skip

_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]
_RESAMPLING = {"bicubic": 3, "bilinear": 2, "nearest": 0}


def is_open_clip(config: Mapping[str, object]) -> bool:
    """Whether a JSON file is open_clip's, of a published model or of the package."""
    model = config.get("model_cfg", config)
    return isinstance(model, dict) and "vision_cfg" in model and "text_cfg" in model


def to_clip_config(config: Mapping[str, object], where: str) -> JsonObject:
    """Returns the config of a CLIPModel, with what preprocessor_config.json says under ``PREPROCESSING``.

    Raises
    ------
    TargetError
        ``unsupported-architecture`` for a model that CLIPModel cannot be; ``odd-config``.
    """
    nested = config.get("model_cfg", config)
    model = nested if isinstance(nested, dict) else {}
    vision, text = _part(model, "vision_cfg"), _part(model, "text_cfg")
    _refuse_others(vision, text, where)
    projection = dimension(model, "embed_dim", 512, where)
    # open_clip trains with an exact GELU unless it says otherwise; OpenAI's own weights need the quick one.
    shared: JsonObject = {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") is True else "gelu",
        "projection_dim": projection,
    }
    image = _square(vision, "image_size", 224, where)
    return {
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": shared | _text(text, where),
        "vision_config": shared | _vision(vision, image, where),
        PREPROCESSING: _preprocessing(config.get("preprocess_cfg"), image),
    }


def _part(model: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = model.get(key)
    return value if isinstance(value, dict) else {}


def _refuse_others(vision: Mapping[str, object], text: Mapping[str, object], where: str) -> None:
    odd = [f"{key}: {part[key]!r}" for part in (vision, text) for key, value in _NEUTRAL.items()
           if key in part and part[key] != value]  # fmt: skip
    if isinstance(vision.get("layers"), list):
        odd.append("a ResNet")
    if odd:
        raise TargetError(
            "unsupported-architecture",
            "this model of open_clip is not one that CLIPModel can be",
            where=where,
            found=", ".join(odd)[:120],
            expected="a ViT and a text transformer as OpenAI's CLIP has them",
        )


def _vision(config: Mapping[str, object], image: int, where: str) -> JsonObject:
    width = dimension(config, "width", 768, where)
    return {
        "hidden_size": width,
        "image_size": image,
        "intermediate_size": int(width * _ratio(config)),
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": width // dimension(config, "head_width", 64, where),
        "num_channels": 3,
        "num_hidden_layers": layers({"num_hidden_layers": config.get("layers")}, 12, where),
        "patch_size": _square(config, "patch_size", 16, where),
    }


def _text(config: Mapping[str, object], where: str) -> JsonObject:
    width, rows = dimension(config, "width", 512, where), dimension(config, "vocab_size", 49408, where)
    return {
        # The last two tokens: <|startoftext|> and <|endoftext|>. The pooled token is the one of the highest id.
        "bos_token_id": rows - 2,
        "eos_token_id": rows - 1,
        "hidden_size": width,
        "intermediate_size": int(width * _ratio(config)),
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": dimension(config, "context_length", 77, where),
        "model_type": "clip_text_model",
        "num_attention_heads": dimension(config, "heads", 8, where),
        "num_hidden_layers": layers({"num_hidden_layers": config.get("layers")}, 12, where),
        "vocab_size": rows,
    }


def _ratio(config: Mapping[str, object]) -> float:
    return finite(config, "mlp_ratio", 4.0, "the OpenCLIP config")


def _square(config: Mapping[str, object], key: str, default: int, where: str) -> int:
    value = config.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return dimension({key: value[0]}, key, default, where)
    return dimension(config, key, default, where)


def _preprocessing(stated: object, image: int) -> JsonObject:
    config = stated if isinstance(stated, dict) else {}
    return {
        "crop_size": {"height": image, "width": image},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": config.get("mean", _MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": config.get("std", _STD),
        "resample": _RESAMPLING.get(str(config.get("interpolation", "bicubic")), 3),
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image},
    }
