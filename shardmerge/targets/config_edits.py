"""What a mapping says of the config.json that it publishes, and the counts that follow from the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.targets.stated_sizes import Contradiction


@dataclass(frozen=True, slots=True)
class ConfigEdits:
    """``config:`` of a mapping, carried out in this order.

    Attributes
    ----------
    take
        The nested config that becomes the whole, by its key, outer ones first with dots between; empty for none.
    remove
        Keys, dotted likewise.
    set
        Values by dotted key.
    where
        The place in the mapping, for messages.
    """

    take: str = ""
    remove: tuple[str, ...] = ()
    set: Mapping[str, object] = field(default_factory=dict)
    where: str = ""


# What the whole says for its parts: types of the weights, and how they are stored.
_INHERITED = ("dtype", "torch_dtype", "quantization_config", "transformers_version", "tie_word_embeddings")

# The class that loads a part as a model of its own: transformers' MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, and CLIP's towers.
PART_CLASSES = {
    "clip_text_model": "CLIPTextModel", "clip_vision_model": "CLIPVisionModel", "cohere2": "Cohere2ForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM", "gpt2": "GPT2LMHeadModel", "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM", "ministral3": "Ministral3ForCausalLM", "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM", "opt": "OPTForCausalLM", "phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "siglip_text_model": "SiglipTextModel",
    "siglip_vision_model": "SiglipVisionModel", "smollm3": "SmolLM3ForCausalLM",
}  # fmt: skip


def edited(config: Mapping[str, object], edits: ConfigEdits, tensors: Iterable[str]) -> JsonObject:
    """Returns the config that the mapping asks for.

    Parameters
    ----------
    config
        As the target makes it.
    edits
        Of the mapping.
    tensors
        Names beside it: a language model without a head is the base model.

    Raises
    ------
    TargetError
        ``no-such-key``: ``take`` or ``remove`` names what is not there, ``set`` a key inside of a plain value.
    """
    result: JsonObject = deepcopy(dict(config))
    if edits.take:
        result = _taken(result, edits, frozenset(tensors))
    for key in edits.remove:
        place = _place(result, key, edits, create=False)
        if key.rsplit(".", 1)[-1] not in place:
            raise _no_key("remove", key, place, edits)
        del place[key.rsplit(".", 1)[-1]]
    for key, value in edits.set.items():
        _place(result, key, edits, create=True)[key.rsplit(".", 1)[-1]] = deepcopy(value)
    return result


def _taken(config: JsonObject, edits: ConfigEdits, tensors: frozenset[str]) -> JsonObject:
    holder = _place(config, edits.take, edits, create=False)
    part = holder.get(edits.take.rsplit(".", 1)[-1])
    if not isinstance(part, dict):
        raise _no_key("take", edits.take, holder, edits)
    inherited = {key: config[key] for key in _INHERITED if key in config}
    result = {**inherited, **part}
    model_type = result.get("model_type")
    name = PART_CLASSES.get(model_type, "") if isinstance(model_type, str) else ""
    if name and not result.get("architectures"):
        headless = name.endswith("ForCausalLM") and not result.get("tie_word_embeddings")
        without = headless and not any(one.endswith("lm_head.weight") for one in tensors)
        result["architectures"] = [name.replace("ForCausalLM", "Model") if without else name]
    return result


def _place(config: JsonObject, key: str, edits: ConfigEdits, *, create: bool) -> JsonObject:
    """Returns the object that holds the last name of a dotted key."""
    place = config
    for name in key.split(".")[:-1]:
        inner = place.setdefault(name, {}) if create else place.get(name)
        if not isinstance(inner, dict):
            raise _no_key("set" if create else "remove", key, place, edits)
        place = inner
    return place


def _no_key(what: str, key: str, place: Mapping[str, object], edits: ConfigEdits) -> TargetError:
    keys = [name for name, value in place.items() if what != "take" or isinstance(value, dict)]
    return TargetError(
        "no-such-key",
        f"`{what}: {key}` names no such key of config.json",
        where=edits.where,
        found=f"keys {shown(sorted(keys), 200)}",
        hint=f"remove `{what}: {key}`, or name one of these keys",
    )


def counted(
    config: Mapping[str, object], told: Iterable[Contradiction], said: Iterable[str]
) -> tuple[JsonObject, tuple[str, ...]]:
    """Fills in the counts that follow from the tensors.

    Parameters
    ----------
    config
        To be published.
    told
        What its tensors contradict; those with a number of their own are filled in.
    said
        Dotted keys that the user set, which stay.

    Returns
    -------
    tuple
        The config and a line about each change.
    """
    result: JsonObject = deepcopy(dict(config))
    lines: list[str] = []
    for one in told:
        key = ".".join(one.path)
        if one.found is None or key in said:
            continue
        place = result
        for name in one.path[:-1]:
            inner = place[name]
            assert isinstance(inner, dict)  # a contradiction is about a key that is there
            place = inner
        place[one.path[-1]] = one.found
        lines.append(f"config.json: {key} is {one.found}, which the source calls {shown(one.stated)}: {one.detail}")
        lines += _relisted(place, one.found) if one.path[-1] == "num_hidden_layers" else ()
    return result, tuple(lines)


def _relisted(place: JsonObject, count: int) -> list[str]:
    """``layer_types`` has an item a layer; where all are alike, more or fewer are no question."""
    listed = place.get("layer_types")
    if not isinstance(listed, list) or not listed or any(item != listed[0] for item in listed):
        return []
    place["layer_types"] = listed[:1] * count
    return [f"config.json: layer_types has {count} items"]
