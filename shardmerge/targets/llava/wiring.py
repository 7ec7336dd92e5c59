"""How the visual encoder's output reaches the language model: which layer, which tokens, how many linear layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import is_whole
from shardmerge.targets.llava import official_config
from shardmerge.targets.training_config import TrainingFacts
from shardmerge.tensors import Catalog

_PROJECTOR = re.compile(r"(?:projector\.model|(?:model\.)?mm_projector)\.(\d{1,3})\.weight")
_MAX_DEPTH = 64

_LAYER, _FEATURE = "vision_feature_layer", "vision_feature_select_strategy"
# What LLaVA's own code calls them; `patch` leaves the class token out, `cls_patch` keeps it (`clip_encoder.py`).
_STRATEGIES: Mapping[object, Literal["default", "full"]] = {
    "default": "default",
    "patch": "default",
    "full": "full",
    "cls_patch": "full",
}


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
    warnings
        What nobody says and is taken for granted.
    """

    layer: int | tuple[int, ...] = -2
    strategy: Literal["default", "full"] = "default"
    depth: int | None = 2
    told: str = ""
    activation: str = "gelu"
    bias: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """How many layers of the encoder feed the projector."""
        return len(self.layer) if isinstance(self.layer, tuple) else 1


def wire(
    facts: TrainingFacts,
    trained: Catalog | None,
    config: Mapping[str, object],
    where: str = "",
    *,
    class_token: bool = True,
) -> Wiring:
    """Returns the wiring: as the training config says, else as ``config`` says, else as LLaVA 1.5 has it.

    Parameters
    ----------
    facts, trained
        The checkpoint, whose projector counts for more than a base's.
    config
        A LLaVA's config.json, of either kind: of the training run, or of the text base; or a language model's that says
        nothing.
    where
        Its file.
    class_token
        Whether the encoder has one. Without it LLaVA's own code and XTuner drop nothing, whatever the setting says.

    Raises
    ------
    TargetError
        ``odd-config`` for a setting that is there and cannot be used.
    """
    depth, told = _depth(facts, trained, config)
    layer = facts.visual_select_layer if facts.visual_select_layer is not None else _layer(config, where)
    return Wiring(
        layer=-2 if layer is None else layer,
        strategy=_strategy(config, where, class_token=class_token),
        depth=depth,
        told=told,
        activation=_activation(config, where),
        bias=_bias(config, where),
        warnings=_unsaid(facts, trained, config, where) if layer is None else (),
    )


def _unsaid(facts: TrainingFacts, trained: Catalog | None, config: Mapping[str, object], where: str) -> tuple[str, ...]:
    """LLaVA's own code has no default for the layer; transformers and XTuner have -2."""
    if trained is not None and trained.training_config and facts == TrainingFacts():
        told = f"the training config in {trained.path} cannot be read"
        return (f"{told}: `visual_select_layer` -2, XTuner's default, is assumed",)
    if official_config.is_official(config):
        return (f"{where} does not say `mm_vision_select_layer`: -2, the layer of LLaVA 1.5, is assumed",)
    return ()


def _layer(config: Mapping[str, object], where: str) -> int | tuple[int, ...] | None:
    key = _LAYER if _LAYER in config else "mm_vision_select_layer"
    stated = config.get(key)
    if stated is None or is_whole(stated):
        return stated
    if isinstance(stated, list) and stated and all(map(is_whole, stated)):
        return tuple(stated)
    raise _odd(key, stated, "a number, or a list of numbers", where)


def _strategy(config: Mapping[str, object], where: str, *, class_token: bool) -> Literal["default", "full"]:
    key = _FEATURE if _FEATURE in config else "mm_vision_select_feature"
    stated = config.get(key)
    if stated is None:
        return "default" if class_token else "full"
    if isinstance(stated, str) and stated in _STRATEGIES:
        return _STRATEGIES[stated] if class_token or key == _FEATURE else "full"
    raise _odd(key, stated, "`default` or `full`, in LLaVA's own code `patch` or `cls_patch`", where)


def _activation(config: Mapping[str, object], where: str) -> str:
    stated = config.get("projector_hidden_act")
    if stated is None or isinstance(stated, str):
        return stated or "gelu"
    raise _odd("projector_hidden_act", stated, "the name of an activation", where)


def _bias(config: Mapping[str, object], where: str) -> bool:
    stated = config.get("multimodal_projector_bias")
    if stated is None or isinstance(stated, bool):
        return stated is not False
    raise _odd("multimodal_projector_bias", stated, "true or false", where)


def _odd(key: str, stated: object, expected: str, where: str) -> TargetError:
    what = f"`{key}` in config.json cannot be used"
    return TargetError("odd-config", what, where=where, found=shown(stated), expected=expected)


def _depth(facts: TrainingFacts, trained: Catalog | None, config: Mapping[str, object]) -> tuple[int | None, str]:
    if facts.projector_depth is not None:
        return facts.projector_depth, f"projector_depth {facts.projector_depth} in the training config"
    stated = official_config.projector_depth(config) if "mm_projector_type" in config else 0
    told = f"mm_projector_type {shown(config.get('mm_projector_type'))}"
    if stated is None:
        # Another class may have layers of the same names: what it is called counts.
        return None, told
    indices = [int(match[1]) for name in trained.names() if (match := _PROJECTOR.fullmatch(name))] if trained else []
    if indices and max(indices) // 2 < _MAX_DEPTH:
        # A linear layer and an activation take turns.
        return max(indices) // 2 + 1, f"projector layers 0 to {max(indices)} in the checkpoint"
    return (stated, told) if stated else (2, "")
