"""Which model XTuner trained: its class, its encoder's, and the settings that no tensor shows.

Keys are those of ``xtuner.model.LLaVAModel``. What is not known there is an error, as far as the config can be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardmerge.targets.training_config import ConfigValue, config_integer, lookup, part_of, plain_text


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Which model was trained.

    Attributes
    ----------
    name, vision
        The classes of the model and of its encoder, without their module; ``""`` where they are not texts.
    max_position_embeddings
        To how many tokens the rotary embedding was stretched, ``None`` where it was not.
    odd
        Settings of the model that are not known here, or that are there and cannot be read.
    """

    name: str = ""
    vision: str = ""
    max_position_embeddings: int | None = None
    odd: tuple[str, ...] = ()


# Arguments of ``xtuner.model.LLaVAModel`` and of mmengine's ``BaseModel``; the numbers are those that have to be read.
_NUMBERS = ("max_position_embeddings", "projector_depth", "visual_select_layer")
_SETTINGS = (
    *_NUMBERS, "data_preprocessor", "freeze_llm", "freeze_visual_encoder", "init_cfg", "llm", "llm_lora",
    "pretrained_pth", "type", "use_activation_checkpointing", "visual_encoder", "visual_encoder_lora",
)  # fmt: skip

# What a setting has that does nothing: each token of an image is fed alone.
_IDLE: Mapping[str, ConfigValue] = {"token_merge_ratio": 1}


def read_model_facts(text: str) -> ModelFacts:
    """Returns which model a training config trains. Never raises, and never runs the text."""
    model = lookup(text, "model")
    if not isinstance(model, Mapping):
        return ModelFacts()
    vision = part_of(model, "visual_encoder")
    return ModelFacts(
        _class(model), _class(vision), config_integer(model, "max_position_embeddings"), tuple(_odd(model))
    )


def _class(section: Mapping[str, ConfigValue]) -> str:
    """Returns the class of ``type``: ``CLIPVisionModel`` for ``transformers.CLIPVisionModel.from_pretrained``."""
    return plain_text(section, "type").removesuffix(".from_pretrained").rsplit(".", 1)[-1]


def _odd(model: Mapping[str, ConfigValue]) -> Iterator[str]:
    for key, value in model.items():
        unread = key in _NUMBERS and value is not None and config_integer(model, key) is None
        idle = value in (None, False) or value == _IDLE.get(key)
        if unread or (key not in _SETTINGS and not idle):
            yield key
