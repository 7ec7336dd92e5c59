"""The config of a text model, as transformers 4.x and 5.x both read it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache

from shardmerge.errors import TargetError
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.config_numbers import JsonObject, portable
from shardmerge.targets.tables import every_table


@cache
def parts() -> tuple[str, ...]:
    """Returns what vision-language models are made of: the language models that transformers itself has."""
    return tuple(table.model_type for table in every_table() if table.kind == "text" and not table.own_code)


def read_part(config: Mapping[str, object], where: str, known: Collection[str] = ()) -> Architecture:
    """Returns the text model of a vision-language model, of any kind or one of those that are known.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, ``odd-config``.
    """
    return read_architecture(config, where, known or parts())


def text_config(config: Mapping[str, object], text: Architecture, rows: int, dtype: str, where: str) -> JsonObject:
    """Returns the config of a text model as it is written, the vocabulary having ``rows`` rows."""
    nested = portable(with_v4_rope(config, text, where), dtype)
    stated: JsonObject = {"model_type": text.model_type, "tie_word_embeddings": text.tied, "vocab_size": rows}
    if "num_key_value_heads" in text.table.fields:
        stated["num_key_value_heads"] = text.kv_heads  # null is fine with 4.x, and refused by 5.x for mistral
    if "num_experts" in text.table.fields:
        stated["num_experts"] = text.count("expert")  # 5.x saves `num_local_experts`, which 4.x does not read
    if "sliding_window_pattern" in text.table.other_fields:
        stated |= _pattern(config)
    return nested | stated


def _pattern(config: Mapping[str, object]) -> JsonObject:
    """Returns what 4.51 has in the place of ``layer_types``: each of how many layers attends to all."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or "full_attention" not in kinds:
        return {}
    every = kinds.index("full_attention") + 1
    alike = all((kind == "full_attention") == ((index + 1) % every == 0) for index, kind in enumerate(kinds))
    return {"sliding_window_pattern": every} if alike else {}


def with_v4_rope(config: Mapping[str, object], text: Architecture, where: str) -> JsonObject:
    """Returns the config with ``rope_theta`` and ``rope_scaling`` in place of ``rope_parameters``.

    Transformers 5 saves ``rope_parameters`` only, which 4.x ignores without a word and takes theta 10000,
    where LLaMA-3 has 500000. The 4.x keys are read by both. Precedence as in 5.x
    (``convert_rope_params_to_dict``): ``rope_scaling`` before ``rope_parameters``, a theta inside of either
    before the one beside it. Gemma 3 has one setting for each kind of layer, and a key for the local theta.
    """
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "rope_local_base_freq" in text.table.other_fields and isinstance(rope, dict):
        rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
        if isinstance(local, dict) and local.keys() <= {"rope_theta", "rope_type"}:
            plain |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        else:
            rope = [rope, local]
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
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return plain
    if text.model_type == "phi3":  # 4.x wants three keys, and the older name of the kind
        plain |= {key: scaling.pop(key) for key in ("original_max_position_embeddings",) if key in scaling}
        scaling = {key: scaling[key] for key in ("long_factor", "short_factor") if key in scaling} | {"type": kind}
    return plain | {"rope_scaling": scaling}


def rope_scaling(config: Mapping[str, object]) -> JsonObject:
    """Returns how a config stretches the rotary embedding, in the words of 4.43 and later; empty where it does not."""
    nested = config.get("rope_scaling") or config.get("rope_parameters")
    found = dict(nested) if isinstance(nested, dict) else {}
    kind = found.pop("type", "default")
    found = {"rope_type": kind} | {key: value for key, value in found.items() if key != "rope_theta"}
    return {} if found["rope_type"] == "default" else found
