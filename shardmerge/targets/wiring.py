"""How the visual encoder's output reaches the language model: which layer, which tokens, how many linear layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shardmerge.targets import official_config
from shardmerge.targets.training_config import TrainingFacts
from shardmerge.tensors import Catalog

_PROJECTOR = re.compile(r"(?:projector\.model|(?:model\.)?mm_projector)\.(\d{1,3})\.weight")
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Wiring:
    """What sits between encoder and language model.

    Attributes
    ----------
    layer
        The encoder layer whose output is taken, from the end where negative; several are joined side by side.
    strategy
        ``default`` drops the class token, ``full`` keeps it.
    depth
        Linear layers of the projector; ``None`` for a projector that is no chain of them.
    told
        Who says the depth, for messages.
    activation
        Between the linear layers.
    bias
        Whether they have one.
    """

    layer: int | tuple[int, ...] = -2
    strategy: Literal["default", "full"] = "default"
    depth: int | None = 2
    told: str = ""
    activation: str = "gelu"
    bias: bool = True

    @property
    def layers(self) -> int:
        """How many layers of the encoder feed the projector."""
        return len(self.layer) if isinstance(self.layer, tuple) else 1


def wire(facts: TrainingFacts, trained: Catalog | None, config: Mapping[str, object]) -> Wiring:
    """Returns the wiring: as the training config says, else as ``config`` says, else as LLaVA 1.5 has it.

    Parameters
    ----------
    facts, trained
        The checkpoint, whose projector counts for more than a base's.
    config
        The text base's config.json: a LLaVA's, of either kind, or a language model's that says nothing.
    """
    depth, told = _depth(facts, trained, config)
    activation, bias = config.get("projector_hidden_act"), config.get("multimodal_projector_bias")
    return Wiring(
        layer=_layer(facts, config),
        strategy=_strategy(config),
        depth=depth,
        told=told,
        activation=activation if isinstance(activation, str) else "gelu",
        bias=bias if isinstance(bias, bool) else True,
    )


def _layer(facts: TrainingFacts, config: Mapping[str, object]) -> int | tuple[int, ...]:
    if facts.visual_select_layer is not None:
        return facts.visual_select_layer
    stated = config.get("vision_feature_layer", config.get("mm_vision_select_layer"))
    if isinstance(stated, list):
        several = tuple(layer for layer in stated if _whole(layer))
        return several if several and len(several) == len(stated) else -2
    return stated if isinstance(stated, int) and not isinstance(stated, bool) else -2


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _strategy(config: Mapping[str, object]) -> Literal["default", "full"]:
    stated = config.get("vision_feature_select_strategy", config.get("mm_vision_select_feature"))
    return "full" if stated in ("full", "cls_patch") else "default"


def _depth(facts: TrainingFacts, trained: Catalog | None, config: Mapping[str, object]) -> tuple[int | None, str]:
    if facts.projector_depth is not None:
        return facts.projector_depth, f"projector_depth {facts.projector_depth} in the training config"
    indices = [int(match[1]) for name in trained.names() if (match := _PROJECTOR.fullmatch(name))] if trained else []
    if indices and max(indices) // 2 < _MAX_DEPTH:
        # A linear layer and an activation take turns.
        return max(indices) // 2 + 1, f"projector layers 0 to {max(indices)} in the checkpoint"
    if "mm_projector_type" in config:
        return official_config.projector_depth(config), f"mm_projector_type {config['mm_projector_type']!r}"[:120]
    return 2, ""
