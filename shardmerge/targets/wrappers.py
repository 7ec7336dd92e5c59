"""Prefixes that training wrappers put before a model's names, known from the config.json that lies beside.

torch's own wrappers may stand anywhere in a name, and a trainer's attribute in front of all. A prefix is taken off only
where the rest are the model's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.targets.known_models import known_model
from shardmerge.tensors import Shape
from shardmerge.tensors.wrapped_names import unwrapped_names

# What a wrapped causal model begins with where it has no head of its own: no class of transformers names its parts so.
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_TWICE = ("model.model.", "model.transformer.", "model.gpt_neox.")


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """Names without a wrapper's prefix.

    Attributes
    ----------
    names
        As found, and as the model has them.
    prefixes
        What was taken off.
    outside
        Names that the wrapper has beside the model: a loss, a step, a value head.
    """

    names: Mapping[str, str]
    prefixes: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


def unwrapped(config: Mapping[str, object], tensors: Mapping[str, Shape], where: str) -> Unwrapped:
    """Returns the model's names for those of a checkpoint whose config.json lies beside it.

    Parameters
    ----------
    config
        Of the model.
    tensors
        Names and shapes of the checkpoint.
    where
        The config's file.
    """
    names, words = unwrapped_names(tensors)
    prefix = _prefix(config, {clean: tensors[name] for name, clean in names.items()}, where)
    outside = tuple(name for name, clean in names.items() if not clean.startswith(prefix))
    names = {name: clean.removeprefix(prefix) for name, clean in names.items() if name not in outside}
    if len(set(names.values())) < len(names):  # two copies of a model are no wrapper's doing
        return Unwrapped({name: name for name in tensors})
    return Unwrapped(names, (*words, *((prefix,) if prefix else ())), outside)


def _prefix(config: Mapping[str, object], shapes: Mapping[str, Shape], where: str) -> str:
    """Returns what stands before the whole model, ``""`` where nothing does or it cannot be known."""
    ends = [name[: -len(word)] for word in _LANDMARKS for name in shapes if name.endswith(f".{word}")]
    whole = [prefix for prefix in dict.fromkeys(ends) if _is_whole(config, _behind(prefix, shapes), where)]
    if whole:  # several: a policy and its reference, and which is meant cannot be known
        return whole[0] if len(whole) == 1 and not _is_whole(config, shapes, where) else ""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(first, str) or not first.endswith(_CAUSAL) or "lm_head.weight" in shapes:
        return ""
    heads = [name.removesuffix("lm_head.weight") for name in shapes if name.endswith(".lm_head.weight")]
    twice = ["model."] if not heads and any(name.startswith(_TWICE) for name in shapes) else []
    alone = [one for one in {*heads, *twice} if all(_begins(name, shape, one) for name, shape in shapes.items())]
    return alone[0] if len(alone) == 1 else ""


# Names that a model of a known class has exactly once; each may stand behind a prefix.
_LANDMARKS = (
    "model.norm.weight", "norm.weight", "language_model.model.norm.weight", "vision_model.post_layernorm.weight",
    "text_model.final_layer_norm.weight", "logit_scale",
)  # fmt: skip


def _behind(prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _is_whole(config: Mapping[str, object], shapes: Mapping[str, Shape], where: str) -> bool:
    try:
        known = known_model(config, shapes, where)
    except TargetError:
        return False
    if known is None:
        return False
    there = {known.canonical(name): shape for name, shape in shapes.items()}
    return all(there.get(name) == shape for name, shape in known.tensors.items())


def _begins(name: str, shape: Shape, prefix: str) -> bool:
    """A single number beside the model is the trainer's."""
    return name.startswith(prefix) or shape in ((), (1,))
