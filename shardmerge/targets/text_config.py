"""The config of a text model, as transformers 4.x and 5.x both read it."""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.config_numbers import JsonObject, portable

# What the vision-language models here are made of.
PARTS = ("llama", "mistral", "qwen2")


def read_part(config: Mapping[str, object], where: str) -> Architecture:
    """Returns the text model of a vision-language model.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, ``odd-config``.
    """
    try:
        return read_architecture(config, where, PARTS)
    except TargetError as error:
        if config.get("model_type") == "phi3":
            error.hint = "split its fused layers to the LLaMA layout first: --use llama/phi3-to-llama"
        raise


def text_config(config: Mapping[str, object], text: Architecture, rows: int, dtype: str, where: str) -> JsonObject:
    """Returns the config of a text model as it is written, the vocabulary having ``rows`` rows."""
    nested = portable(with_v4_rope(config, text, where), dtype)
    stated: JsonObject = {"model_type": text.model_type, "tie_word_embeddings": text.tied, "vocab_size": rows}
    if "num_key_value_heads" in text.table.fields:
        stated["num_key_value_heads"] = text.kv_heads  # null is fine with 4.x, and refused by 5.x for mistral
    return nested | stated


def with_v4_rope(config: Mapping[str, object], text: Architecture, where: str) -> JsonObject:
    """Returns the config with ``rope_theta`` and ``rope_scaling`` in place of ``rope_parameters``.

    Transformers 5 saves ``rope_parameters`` only, which 4.x ignores without a word and takes theta 10000,
    where LLaMA-3 has 500000. The 4.x keys are read by both. Precedence as in 5.x
    (``convert_rope_params_to_dict``): ``rope_scaling`` before ``rope_parameters``, a theta inside of either
    before the one beside it.
    """
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise TargetError(
            "odd-config",
            "the rotary embedding in config.json is not one setting for all layers",
            where=where,
            found=repr(rope)[:120],
            expected="`rope_theta` and `rope_scaling`, or one flat `rope_parameters`",
        )
    scaling = dict(rope)
    for key, default in (("rope_theta", text.table.rope_theta), ("partial_rotary_factor", None)):
        value = scaling.pop(key, plain.get(key, default))
        if value is not None:
            plain[key] = value
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return plain
    return plain | {"rope_scaling": scaling}
