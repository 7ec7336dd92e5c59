"""The Hugging Face LLaVAs that are known: 1.5, and 1.6 (NeXT), which cuts a large image into tiles.

A NeXT has one tensor more, ``image_newline``, and a list of the resolutions that tiles may add up to. All others
(``vipllava``, ``video_llava``, ``llava_onevision``, ``llava_next_video``, PaliGemma ...) have parts of the same names
and put them together in another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.settings import refuse_unknown_around


@dataclass(frozen=True, slots=True)
class LlavaKind:
    """What sets one Hugging Face LLaVA apart from another.

    Attributes
    ----------
    model_type, architecture, processor_class
        As its files name them.
    newline
        Whether it has ``image_newline``, and tiles.
    """

    model_type: str
    architecture: str
    processor_class: str
    newline: bool


LLAVA = LlavaKind("llava", "LlavaForConditionalGeneration", "LlavaProcessor", newline=False)
NEXT = LlavaKind("llava_next", "LlavaNextForConditionalGeneration", "LlavaNextProcessor", newline=True)

_KINDS = {kind.model_type: kind for kind in (LLAVA, NEXT)}

# LlavaConfig and LlavaNextConfig from 4.36 to 5.23.
_LLAVA = (
    "ignore_index", "image_grid_pinpoints", "image_seq_length", "image_token_id", "image_token_index",
    "initializer_range", "multimodal_projector_bias", "projector_hidden_act", "text_config",
    "use_image_newline_parameter", "vision_config", "vision_feature_layer", "vision_feature_select_strategy",
    "vocab_size",
)  # fmt: skip

# Tiles of a 336 pixel encoder, height before width: what LlavaNextConfig has where a config says nothing.
_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def kind_of(whole: Mapping[str, object], where: str) -> LlavaKind:
    """Returns the kind of a Hugging Face config that holds a language model as ``text_config``.

    Raises
    ------
    TargetError
        ``unsupported-architecture``: another model, or one with settings that nothing here understands.
    """
    stated = whole.get("model_type")
    kind = _KINDS.get(stated) if isinstance(stated, str) else None
    if kind is None:
        raise TargetError(
            "unsupported-architecture",
            "the model is not a LLaVA whose parts are known here",
            where=where,
            found=f"model_type {shown(stated)}",
            expected=f"model_type {' or '.join(_KINDS)}",
        )
    refuse_unknown_around(whole, _LLAVA, f"a plain {kind.model_type}", where)
    return kind


def pinpoints(whole: Mapping[str, object], image_size: int, where: str) -> list[list[int]]:
    """Returns the resolutions that a config lists, else those of LLaVA 1.6 for an encoder of this image size.

    Raises
    ------
    TargetError
        ``odd-config``.
    """
    stated = whole.get("image_grid_pinpoints")
    if stated is None:
        return [[image_size * high, image_size * wide] for high, wide in _TILES]
    pairs = stated if isinstance(stated, list) else []
    if pairs and all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_size, pair)) for pair in pairs):
        return pairs
    raise TargetError(
        "odd-config",
        "`image_grid_pinpoints` in config.json cannot be used",
        where=where,
        found=shown(stated),
        expected="a list of [height, width]",
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
