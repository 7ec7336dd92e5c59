"""The config.json of LLaVA's own code: a language model's config with ``mm_*`` fields among its own.

Field names are those of haotian-liu/LLaVA (``llava_arch.py``, ``train.py``), where the config of
LlavaLlamaForCausalLM is LlamaConfig under the name ``llava_llama`` (``llava`` before 1.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardmerge.targets.architectures import JsonObject

_FAMILIES = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_CLASSES = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2"}

# Fields of the multimodal part whose names do not begin with mm_.
_OWN = (
    "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "image_aspect_ratio", "image_crop_resolution",
    "image_grid_pinpoints", "image_split_resolution", "tokenizer_model_max_length", "tokenizer_padding_side",
    "tune_mm_mlp_adapter", "tune_mm_vision_resampler", "unfreeze_mm_vision_tower", "use_mm_proj",
)  # fmt: skip

_MLP = re.compile(r"mlp(\d{1,2})x_gelu")


def is_official(config: Mapping[str, object]) -> bool:
    """Whether a config.json is one of LLaVA's own code; ``llava`` is also what Hugging Face's says."""
    if isinstance(config.get("text_config"), dict):
        return False
    return config.get("model_type") in (*_FAMILIES, "llava") or "mm_vision_tower" in config


def language_part(config: Mapping[str, object]) -> JsonObject:
    """Returns the language model's config, with the ``model_type`` of a plain one."""
    model_type = _FAMILIES.get(str(config.get("model_type")), "")
    named = config.get("architectures")
    classes = named if isinstance(named, list) else []
    kind = model_type or next((_CLASSES[str(name)] for name in classes if str(name) in _CLASSES), "llama")
    kept = {key: value for key, value in config.items() if not key.startswith("mm_") and key not in _OWN}
    return kept | {"model_type": kind}


def projector_depth(config: Mapping[str, object]) -> int | None:
    """Returns the linear layers of ``mm_projector_type``; ``None`` for a type that is no chain of them.

    ``build_vision_projector``: ``linear``, or ``mlp2x_gelu`` with a GELU between two layers. An absent type is linear.
    """
    kind = config.get("mm_projector_type", "linear")
    if kind == "linear":
        return 1
    match = _MLP.fullmatch(kind) if isinstance(kind, str) else None
    return int(match[1]) if match else None
