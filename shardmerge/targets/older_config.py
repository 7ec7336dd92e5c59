"""A config.json as older versions of transformers read it.

Every version reads what older ones wrote. The other way it does not, and says nothing: 4.x passes over
``rope_parameters`` and takes theta 10000. So a config for 5.0 and later stays as it is, and one for 4.x is said as 4.x
says it. Facts of 4.51.3, 4.57.1 and 5.23.0, each of which wrote the config of the same models.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import JsonObject

# Their classes of 4.x read `rope_scaling` without asking whether it is there.
_WANT_SCALING = ("mllama_text_model", "qwen3_vl_text")

# Types of rope that are no scaling: `axial` is what 5.x calls the two dimensions of a picture.
_PLAIN_ROPE = ("default", "axial")

# What 5.x calls otherwise than 4.x, by model type.
_RENAMED = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "gemma3_text": {"_sliding_window_pattern": "sliding_window_pattern"},
}

# Their language models had no config of their own before 4.52.
_FLAT = ("qwen2_vl", "qwen2_5_vl")

_GEMMA_PATTERN = 6  # the default of sliding_window_pattern: each sixth layer sees all


def older_config(config: JsonObject, *, flat: bool, where: str) -> JsonObject:
    """Returns the config as transformers 4.x says it.

    Parameters
    ----------
    config
        Of any version.
    flat
        Whether for 4.51, in which the language model of a Qwen2-VL stood in the config itself.
    where
        The file, for messages.

    Raises
    ------
    TargetError
        ``unsupported-rope``: a rotary embedding that 4.x has no words for.
    """
    made = _older(config, where)
    if str(config.get("transformers_version", "")).startswith("5"):
        made = _tied_alike(made)
    return _flattened(made) if flat and config.get("model_type") in _FLAT else made


def _older(config: Mapping[str, object], where: str) -> JsonObject:
    """Returns a config and those inside of it with the keys of 4.x."""
    renamed = _RENAMED.get(str(config.get("model_type")), {})
    made: JsonObject = {renamed.get(key, key): value for key, value in config.items() if key != "dtype"}
    if isinstance(config.get("dtype"), str):
        made.setdefault("torch_dtype", config["dtype"])
    for key, value in made.items():
        if isinstance(value, dict) and key.endswith("_config"):
            made[key] = _older(value, where)
    rope = made.pop("rope_parameters", None)
    if isinstance(rope, dict):
        made |= _older_rope(rope, str(config.get("model_type")), where)
    if config.get("model_type") == "gemma3_text":
        _check_pattern(made, where)
    return made


def _older_rope(rope: Mapping[str, object], model_type: str, where: str) -> JsonObject:
    """Returns ``rope_theta``, ``rope_scaling`` and the like."""
    if model_type == "gemma3_text" and isinstance(rope.get("sliding_attention"), dict):
        local, whole = rope["sliding_attention"], rope.get("full_attention")
        if isinstance(local, dict) and isinstance(whole, dict) and local.get("rope_type") == "default":
            return _older_rope(whole, model_type, where) | {"rope_local_base_freq": local.get("rope_theta")}
    if any(isinstance(value, dict) for value in rope.values()):
        raise TargetError(
            "unsupported-rope",
            "layers of several kinds have rotary embeddings of their own, which transformers 4.x cannot express",
            where=where,
            found=f"rope_parameters {shown(dict(rope))}",
            hint='ask for a generation that reads it: `generation: "5.0"`',
        )
    scaling = dict(rope)
    made: JsonObject = {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    plain = kind in _PLAIN_ROPE and not set(scaling) - {"rope_type", "type"}
    if plain and model_type not in _WANT_SCALING:
        return made
    return made | {"rope_scaling": scaling}


def _check_pattern(config: Mapping[str, object], where: str) -> None:
    """Checks that a Gemma 3 says its layers by a pattern: 4.51 knows no list."""
    kinds, pattern = config.get("layer_types"), config.get("sliding_window_pattern", _GEMMA_PATTERN)
    if not isinstance(kinds, list) or not isinstance(pattern, int) or pattern < 1:
        return
    full = [kind == "full_attention" for kind in kinds]
    if full != [(number + 1) % pattern == 0 for number in range(len(kinds))]:
        raise TargetError(
            "unsupported-rope",
            "the layers of full attention are a list in transformers 5, and no pattern that 4.51 can read",
            where=where,
            found=f"layer_types {shown(kinds)}, sliding_window_pattern {pattern}",
            hint='ask for a generation that reads it: `generation: "5.0"`',
        )


def _tied_alike(config: JsonObject) -> JsonObject:
    """In 5.x the whole says whether the head is tied, in 4.x the language model."""
    text, tied = config.get("text_config"), config.get("tie_word_embeddings")
    if not isinstance(text, dict) or not isinstance(tied, bool):
        return config
    return {**config, "text_config": {**text, "tie_word_embeddings": tied}}


def _flattened(config: JsonObject) -> JsonObject:
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict):
        return config
    made = {key: value for key, value in config.items() if key != "text_config"}
    if isinstance(vision, dict):
        made["vision_config"] = {**vision, "model_type": config.get("model_type")}
    return {**{key: value for key, value in text.items() if key != "model_type"}, **made}
