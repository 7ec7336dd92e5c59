"""The config.json of LLaVA's own code: a language model's config with ``mm_*`` fields among its own.

Field names are those of haotian-liu/LLaVA (``llava_arch.py``, ``train.py``) and LLaVA-VL/LLaVA-NeXT, where the config
of LlavaLlamaForCausalLM is LlamaConfig under the name ``llava_llama`` (``llava`` before 1.2). A Gemma or Phi in there
has the same tensors under the same names and another arithmetic, so that the family is read and never assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.targets.settings import refuse_unknown, unknown_settings

# `llava` is also what code before 1.2, XTuner and LLaVA-NeXT write, over any language model.
_FAMILIES = {
    "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2", "llama": "llama", "mistral": "mistral",
    "qwen2": "qwen2",
}  # fmt: skip
_CLASSES = {
    "LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
}  # fmt: skip

# Fields of the multimodal part whose names do not begin with mm_, and what the training script notes.
_OWN = (
    "delay_load", "force_sample", "freeze_backbone", "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler",
    "image_aspect_ratio", "image_crop_resolution", "image_grid_pinpoints", "image_split_resolution", "lora_enable",
    "pretrain_mm_mlp_adapter", "tokenizer_model_max_length", "tokenizer_padding_side", "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler", "tune_mm_vision_tower", "unfreeze_mm_vision_tower", "use_mm_proj",
    "use_pos_skipping", "vision_tower_pretrained",
)  # fmt: skip

# Read elsewhere, or of no consequence for what the model computes of an image.
_READ = (
    "mm_hidden_size", "mm_patch_merge_type", "mm_projector_lr", "mm_projector_type", "mm_tunable_parts",
    "mm_use_im_patch_token", "mm_use_im_start_end", "mm_vision_select_feature", "mm_vision_select_layer",
    "mm_vision_tower", "mm_vision_tower_lr",
)  # fmt: skip

# For videos alone: how frames are pooled and joined.
_VIDEO = (
    "add_faster_video", "add_time_instruction", "faster_token_stride", "mm_newline_position", "mm_spatial_pool_mode",
    "mm_spatial_pool_out_channels", "mm_spatial_pool_stride", "pos_skipping_range",
)  # fmt: skip

# Of `multimodal_encoder/builder.py`: these names build another class than CLIPVisionTower.
_OTHER_TOWERS = re.compile(
    r"siglip|eva|intern[-_]?vi|imagebind|convnext|dino|open_clip_hub|mlcd|\bsam\b|radio|qwen|languagebind",
    re.IGNORECASE,
)

_MLP = re.compile(r"mlp(\d{1,2})x_gelu")


def is_official(config: Mapping[str, object]) -> bool:
    """Whether a config.json is one of LLaVA's own code; ``llava`` is also what Hugging Face's says."""
    if isinstance(config.get("text_config"), dict):
        return False
    return "mm_vision_tower" in config or any("llava" in name.lower() for name in _names(config))


def _names(config: Mapping[str, object]) -> list[str]:
    """Returns what a config calls its model: ``model_type`` and the first of ``architectures``."""
    stated, classes = config.get("model_type"), config.get("architectures")
    named = classes[:1] if isinstance(classes, list) else []
    return [name for name in (stated, *named) if isinstance(name, str)]


def language_part(config: Mapping[str, object], where: str) -> JsonObject:
    """Returns the language model's config, with the ``model_type`` of a plain one.

    Raises
    ------
    TargetError
        ``unsupported-architecture``: another language model, or settings of one that nothing here understands.
    """
    kind = _family(config, where)
    kept = {key: value for key, value in config.items() if not key.startswith("mm_") and key not in (*_OWN, *_VIDEO)}
    refuse_unknown(kept, kind, (), where)
    kept.pop("architectures", None)
    return kept | {"model_type": kind}


def _family(config: Mapping[str, object], where: str) -> str:
    """Returns the plain ``model_type``, of which all names that the config has must speak."""
    names = _names(config)
    found = {_FAMILIES.get(name) or _CLASSES.get(name) for name in names if name != "llava"}
    if len(found) == 1 and (kind := found.pop()) is not None:
        return kind
    raise TargetError(
        "unsupported-architecture",
        "the language model inside of this LLaVA is not one that is known here",
        where=where,
        found=f"model_type {shown(config.get('model_type'))}, architectures {shown(config.get('architectures'))}",
        expected=", ".join(name for name in _CLASSES if name.startswith("Llava")),
        hint=""
        if names[:1] != ["llava"] or names[1:]
        else 'add to config.json: "architectures": ["LlavaLlamaForCausalLM"], or the class that it is',
    )


def check_images(config: Mapping[str, object], *, tiles: bool | None, where: str) -> None:
    """Checks that a config asks for nothing between image and language model that the target does not do.

    Parameters
    ----------
    config
        Of LLaVA's own code; anything else passes.
    tiles
        Whether the target cuts images into tiles (LLaVA-NeXT) or not (LLaVA 1.5); ``None`` where its config says so.
    where
        The file.

    Raises
    ------
    TargetError
        ``unsupported-architecture``.
    """
    if not is_official(config):
        return
    odd = {key: config[key] for key in config if key.startswith("mm_") and key not in (*_READ, *_VIDEO) and config[key]}
    odd |= {
        key: config[key] for key, usual in (("s2", False), ("use_mm_proj", True)) if config.get(key, usual) != usual
    }
    if odd:
        raise unknown_settings(odd, "a projector of linear layers behind one CLIP, and nothing else", where)
    _check_tower(config, where)
    if tiles is not None:
        _check_tiles(config, tiles=tiles, where=where)


def _check_tower(config: Mapping[str, object], where: str) -> None:
    tower = config.get("mm_vision_tower")
    if isinstance(tower, str) and (match := _OTHER_TOWERS.search(tower.rstrip("/").rsplit("/", 1)[-1])):
        raise TargetError(
            "unsupported-architecture",
            f"the visual encoder of this LLaVA is no CLIP: {match[0]}",
            where=where,
            found=f"mm_vision_tower {shown(tower)}",
            expected="a CLIP, whose class is the only one that the target writes",
        )


def _check_tiles(config: Mapping[str, object], *, tiles: bool, where: str) -> None:
    merge, usual = config.get("mm_patch_merge_type") or "flat", "anyres" if tiles else "square"
    ratio = config.get("image_aspect_ratio") or usual
    if not tiles and (merge != "flat" or ratio not in ("square", "pad")):
        raise TargetError(
            "unsupported-architecture",
            "this is a LLaVA-NeXT (llava_next), which cuts images into tiles, and the target is a LLaVA 1.5, "
            "which does not",
            where=where,
            found=f"mm_patch_merge_type {shown(merge)}, image_aspect_ratio {shown(ratio)}",
            expected="mm_patch_merge_type 'flat', image_aspect_ratio 'pad' or 'square'",
            hint="take the preset of LLaVA-NeXT: `use: llava/official-to-hf-next`"
            if merge == "spatial_unpad" and ratio in ("anyres", usual)
            else "",
        )
    if tiles and (merge != "spatial_unpad" or ratio != "anyres"):
        raise TargetError(
            "unsupported-architecture",
            "this LLaVA does not put its tiles together as a Hugging Face LLaVA-NeXT does",
            where=where,
            found=f"mm_patch_merge_type {shown(merge)}, image_aspect_ratio {shown(ratio)}",
            expected="mm_patch_merge_type 'spatial_unpad', image_aspect_ratio 'anyres'",
            hint="take the preset of LLaVA 1.5: `use: llava/official-to-hf`"
            if merge == "flat" and ratio in (usual, "square", "pad")
            else "",
        )


def projector_depth(config: Mapping[str, object]) -> int | None:
    """Returns the linear layers of ``mm_projector_type``; ``None`` for a type that is no chain of them.

    ``build_vision_projector``: ``linear``, or ``mlp2x_gelu`` with a GELU between two layers. An absent type is linear.
    """
    kind = config.get("mm_projector_type", "linear")
    if kind == "linear":
        return 1
    match = _MLP.fullmatch(kind) if isinstance(kind, str) else None
    return int(match[1]) if match else None
