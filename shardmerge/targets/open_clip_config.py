"""open_clip's ``open_clip_config.json`` (or a model config of its package) as the config.json of a CLIPModel.

Field names and defaults follow ``CLIPVisionCfg`` and ``CLIPTextCfg`` of ``open_clip/model.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import MAX_RATIO, JsonObject, dimension, finite, is_real, layers, odd_config
from shardmerge.targets.settings import not_understood
from shardmerge.targets.vision_tower import TOWERS, standard_processor

PREPROCESSING = "_preprocessing"

# What `CLIPModel` has a place for, or what is of no consequence for a ViT in use. Any other setting that is not idle
# makes another model.
_MODEL = ("cast_dtype", "custom_text", "embed_dim", "init_logit_scale", "quick_gelu", "text_cfg", "vision_cfg")
_VISION = (
    "attn_pooler_heads", "attn_pooler_queries", "head_width", "image_size", "layers", "mlp_ratio", "norm_kwargs",
    "patch_dropout", "patch_size", "timm_drop", "timm_drop_path", "timm_model_pretrained", "timm_pool", "timm_proj",
    "width",
)  # fmt: skip
_TEXT = (
    "context_length", "eos_id", "heads", "hf_model_pretrained", "hf_pooler_type", "hf_proj_type", "hf_tokenizer_name",
    "layers", "mlp_ratio", "norm_kwargs", "pad_id", "tokenizer_kwargs", "tokenizer_mode", "vocab_size", "width",
)  # fmt: skip
# Settings whose usual value is a word or a switch that is on.
_USUAL: Mapping[str, tuple[object, ...]] = {
    "block_type": (None, "default"), "pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",),
    "proj_type": ("linear",), "hf_model_name": (None,), "timm_model_name": (None,),
}  # fmt: skip
_EPSILON = 1e-5

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
    _refuse_others(model, vision, text, where)
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
        PREPROCESSING: _preprocessing(config.get("preprocess_cfg"), image, where),
    }


def _part(model: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = model.get(key)
    return value if isinstance(value, dict) else {}


def _odd(part: Mapping[str, object], known: Collection[str]) -> dict[str, object]:
    words = {key: part[key] for key, usual in _USUAL.items() if key in part and part[key] not in usual}
    kwargs = part.get("norm_kwargs")
    if isinstance(kwargs, dict) and set(kwargs) - {"eps"}:
        words["norm_kwargs"] = kwargs
    return words | not_understood(part, (*known, *_USUAL))


def _refuse_others(
    model: Mapping[str, object], vision: Mapping[str, object], text: Mapping[str, object], where: str
) -> None:
    odd = _odd(model, _MODEL) | _odd(vision, _VISION) | _odd(text, _TEXT)
    odd |= {"a ResNet": vision["layers"]} if isinstance(vision.get("layers"), list) else {}
    if odd:
        raise TargetError(
            "unsupported-architecture",
            "this model of open_clip is not one that CLIPModel can be",
            where=where,
            found=shown(odd),
            expected="a ViT and a text transformer as OpenAI's CLIP has them",
        )


def _vision(config: Mapping[str, object], image: int, where: str) -> JsonObject:
    width = dimension(config, "width", 768, where)
    return {
        "hidden_size": width,
        "image_size": image,
        "intermediate_size": int(width * _ratio(config, where)),
        "layer_norm_eps": _epsilon(config, where),
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
        "intermediate_size": int(width * _ratio(config, where)),
        "layer_norm_eps": _epsilon(config, where),
        "max_position_embeddings": dimension(config, "context_length", 77, where),
        "model_type": "clip_text_model",
        "num_attention_heads": dimension(config, "heads", 8, where),
        "num_hidden_layers": layers({"num_hidden_layers": config.get("layers")}, 12, where),
        "vocab_size": rows,
    }


def _epsilon(config: Mapping[str, object], where: str) -> float:
    kwargs = config.get("norm_kwargs")
    return finite(kwargs, "eps", _EPSILON, where, above=0.0) if isinstance(kwargs, dict) else _EPSILON


def _ratio(config: Mapping[str, object], where: str) -> float:
    return finite(config, "mlp_ratio", 4.0, where, above=0.0, most=MAX_RATIO)


def _square(config: Mapping[str, object], key: str, default: int, where: str) -> int:
    value = config.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return dimension({key: value[0]}, key, default, where)
    return dimension(config, key, default, where)


def _preprocessing(stated: object, image: int, where: str) -> JsonObject:
    config = stated if isinstance(stated, dict) else {}
    usual = standard_processor(TOWERS["clip_vision_model"], image)
    return usual | {
        "image_mean": _colours(config, "mean", usual["image_mean"], where),
        "image_std": _colours(config, "std", usual["image_std"], where),
        "resample": _RESAMPLING.get(str(config.get("interpolation", "bicubic")), 3),
    }


def _colours(config: Mapping[str, object], key: str, usual: object, where: str) -> object:
    """Returns a number for each colour."""
    value = config.get(key, usual)
    if isinstance(value, list) and len(value) == 3 and all(map(is_real, value)):
        return value
    raise odd_config(key, value, "three finite numbers", where)
