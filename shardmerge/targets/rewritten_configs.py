"""Configs of models whose fused layers, once split, are a LLaMA's: Phi-3 and InternLM2.

What the class of the config has for a key that is absent is written down: LlamaConfig has other defaults.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.shown import shown
from shardmerge.targets.config_numbers import JsonObject, flag
from shardmerge.targets.foreign_configs import not_llama
from shardmerge.targets.settings import refuse_unknown

# What LlamaConfig has no use for, or would misread.
_PHI_ONLY = ("architectures", "auto_map", "embd_pdrop", "resid_pdrop", "sliding_window")
_PHI_3: JsonObject = {
    "bos_token_id": 1, "eos_token_id": 32000, "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
}  # fmt: skip
# `Phi3Config` reads these names as longrope, which LLaMA knows by its own name only.
_LONGROPE = ("su", "yarn")

_INTERNLM_ONLY = ("architectures", "auto_map", "bias", "attn_implementation")
_INTERNLM_2: JsonObject = {"vocab_size": 103168}


def as_llama(config: JsonObject, where: str) -> tuple[JsonObject, tuple[str, ...]]:
    """Returns the config of the LLaMA that a model is once its fused layers are split, and warnings.

    Raises
    ------
    TargetError
        ``unsupported-architecture`` for settings that LLaMA does not know.
    """
    if config.get("model_type") == "phi3":
        return from_phi3(config, where)
    return (from_internlm2(config, where) if config.get("model_type") == "internlm2" else config), ()


def from_phi3(config: Mapping[str, object], where: str) -> tuple[JsonObject, tuple[str, ...]]:
    """Returns the config for a Phi-3 whose fused layers are split, and warnings (XTuner's ``convert_phi_to_llama.py``).

    Raises
    ------
    TargetError
        ``unsupported-architecture`` for a rotary embedding of part of each head, which LLaMA does not have, and for
        settings that neither knows.
    """
    rope = config.get("rope_parameters")
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor") if isinstance(rope, dict) else None)
    if partial not in (None, 1, 1.0):
        raise not_llama("config.json", where, f"partial_rotary_factor {shown(partial)}", "the whole head rotated")
    kept = {key: value for key, value in config.items() if key not in (*_PHI_ONLY, "partial_rotary_factor")}
    refuse_unknown(kept, "llama", ("original_max_position_embeddings",), where)
    if isinstance(rope, dict):
        kept["rope_parameters"] = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    for key in ("rope_parameters", "rope_scaling"):
        kept |= {key: _named(kept[key])} if key in kept else {}
    window = config.get("sliding_window")
    warnings: tuple[str, ...] = ()
    if isinstance(window, int):
        warnings = (
            f"this Phi-3 looks back {window} tokens at most, as a LLaMA at all: the two differ for longer texts",
        )
    return _PHI_3 | kept | {"model_type": "llama"}, warnings


def _named(rope: object) -> object:
    if not isinstance(rope, dict):
        return rope
    return {
        key: "longrope" if key in ("type", "rope_type") and value in _LONGROPE else value for key, value in rope.items()
    }


def from_internlm2(config: Mapping[str, object], where: str) -> JsonObject:
    """Returns the config for an InternLM2 whose fused ``wqkv`` is split: a LLaMA with a bias where it says ``bias``.

    Raises
    ------
    TargetError
        ``unsupported-architecture`` for settings that LLaMA does not know.
    """
    kept = {key: value for key, value in config.items() if key not in _INTERNLM_ONLY}
    refuse_unknown(kept, "llama", ("use_cache",), where)
    return _INTERNLM_2 | kept | {"model_type": "llama", "attention_bias": flag(config, "bias", where)}
