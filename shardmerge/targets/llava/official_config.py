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
from shardmerge.targets.llava.kinds import KINDS, LlavaKind
from shardmerge.targets.settings import refuse_unknown, unknown_settings
from shardmerge.tensors import Shape

# The language models of LLaVA's code by what follows `llava_`, and in the names of its classes `Llava`. `llava` alone
# is also what code before 1.2, XTuner and LLaVA-NeXT write, over any language model.
_FAMILIES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "gemma3_text": "gemma3_text", "granite": "granite",
    "llama": "llama", "mistral": "mistral", "mixtral": "mixtral", "olmo2": "olmo2", "phi3": "phi3", "qwen": "qwen2",
    "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
# Fields of the multimodal part whose names do not begin with mm_, and what the training script notes.
_OWN = (
    "delay_load", "force_sample", "freeze_backbone", "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler",
    "image_aspect_ratio", "image_crop_resolution", "image_grid_pinpoints", "image_split_resolution",
    "image_token_index", "lora_enable",
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
    found = {_FAMILIES.get(_stem(name)) for name in names if name != "llava"}
    if len(found) == 1 and (kind := found.pop()) is not None:
        return kind
    raise TargetError(
        "unsupported-architecture",
        "the language model inside of this LLaVA is not one that is known here",
        where=where,
        found=f"model_type {shown(config.get('model_type'))}, architectures {shown(config.get('architectures'))}",
        expected=", ".join(f"Llava{name.title()}ForCausalLM" for name in _FAMILIES),
        hint=""
        if names[:1] != ["llava"] or names[1:]
        else 'add to config.json: "architectures": ["LlavaLlamaForCausalLM"], or the class that it is',
    )


def _stem(name: str) -> str:
    """Returns the family in a model type or class: ``qwen`` of ``llava_qwen`` and ``LlavaQwenForCausalLM``."""
    return re.sub(r"^llava_?|forcausallm$", "", name.lower())


def check_images(config: Mapping[str, object], kind: LlavaKind | None, *, tower: str, where: str) -> None:
    """Checks that a config asks for nothing between image and language model that the target does not do.

    Parameters
    ----------
    config
        Of LLaVA's own code; anything else passes.
    kind
        Of the target; ``None`` where it has all of them.
    tower
        The model type of the encoder.
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
        raise unknown_settings(odd, "a projector of linear layers behind one encoder, and nothing else", where)
    _check_tower(config, tower, where)
    if kind is not None:
        _check_kind(config, kind, where)


def _check_tower(config: Mapping[str, object], tower: str, where: str) -> None:
    stated = config.get("mm_vision_tower")
    match = _OTHER_TOWERS.search(stated.rstrip("/").rsplit("/", 1)[-1]) if isinstance(stated, str) else None
    if match and not tower.startswith(match[0].lower()):
        raise TargetError(
            "unsupported-architecture",
            f"the visual encoder of this LLaVA is another than the target takes, or than the source has: {match[0]}",
            where=where,
            found=f"mm_vision_tower {shown(stated)}",
            expected=f"an encoder of model_type {tower}",
        )


def _check_kind(config: Mapping[str, object], kind: LlavaKind, where: str) -> None:
    merge, ratio = config.get("mm_patch_merge_type") or "flat", config.get("image_aspect_ratio") or ""
    fitting = [one for one in KINDS.values() if one.makes(str(merge), str(ratio))]
    if kind not in fitting:
        own = fitting[0] if fitting else None
        is_called = f"a {own.table.title} ({own.model_type})" if own else "no LLaVA that transformers has"
        raise TargetError(
            "unsupported-architecture",
            f"this is {is_called}, by how it cuts images into tiles, and the target is a {kind.table.title}",
            where=where,
            found=f"mm_patch_merge_type {shown(merge)}, image_aspect_ratio {shown(ratio)}",
            expected=f"mm_patch_merge_type {kind.merge!r}, image_aspect_ratio {kind.ratio.replace('|', ' or ')}",
            hint=f"take the preset of {own.table.title}: `use: {own.preset}`" if own else "",
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


def projector_tensors(prefix: str, depth: int, columns: int, hidden: int) -> dict[str, Shape]:
    """Returns the names and shapes of a chain of linear layers; each activation between two has a number as well."""
    tensors: dict[str, Shape] = {}
    for index in range(depth):
        tensors[f"{prefix}{2 * index}.weight"] = (hidden, hidden if index else columns)
        tensors[f"{prefix}{2 * index}.bias"] = (hidden,)
    return tensors
