"""The Hugging Face LLaVAs that are known, as one table: 1.5, 1.6 (NeXT) and OneVision.

The latter two cut a large image into tiles: they have one tensor more, ``image_newline``, and a list of the resolutions
that tiles may add up to. All others (``vipllava``, ``video_llava``, ``llava_next_video``, PaliGemma ...) have parts of
the same names and put them together in another way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import is_size
from shardmerge.targets.settings import refuse_unknown_around
from shardmerge.targets.tables import ArchitectureTable, table_of

IMAGE_TOKEN, PAD_TOKEN, VIDEO_TOKEN = "<image>", "<pad>", "<video>"


@dataclass(frozen=True, slots=True)
class LlavaKind:
    """What sets one Hugging Face LLaVA apart from another.

    Attributes
    ----------
    preset
        The one that makes it of LLaVA's own code.
    model_type, processor_class
        As its files name them.
    image_processor
        The class that cuts images into tiles; ``""`` for the encoder's own.
    tokens
        What its tokenizer needs.
    merge, ratio
        What LLaVA's own code calls the way in which it puts tiles together, and that in which it cuts them: a pattern.
    """

    preset: str
    model_type: str
    processor_class: str
    image_processor: str
    tokens: tuple[str, ...]
    merge: str
    ratio: str

    @property
    def table(self) -> ArchitectureTable:
        """Its names and shapes, its class, and what people call it."""
        return table_of(self.model_type)

    @property
    def newline(self) -> bool:
        """Whether it has ``image_newline``, and tiles."""
        return self.merge == "spatial_unpad"

    def makes(self, merge: str, ratio: str) -> bool:
        """Whether this is what LLaVA's own code does with such settings."""
        return merge == self.merge and bool(re.fullmatch(self.ratio, ratio or ("anyres" if self.newline else "pad")))


LLAVA = LlavaKind(
    "llava/official-to-hf", "llava", "LlavaProcessor", "", (IMAGE_TOKEN, PAD_TOKEN), "flat", "square|pad",
)  # fmt: skip
NEXT = LlavaKind(
    "llava/official-to-hf-next", "llava_next", "LlavaNextProcessor", "LlavaNextImageProcessor",
    (IMAGE_TOKEN, PAD_TOKEN), "spatial_unpad", "anyres",
)  # fmt: skip
ONEVISION = LlavaKind(
    "llava/official-to-hf-onevision", "llava_onevision", "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor",
    (IMAGE_TOKEN, VIDEO_TOKEN), "spatial_unpad", r"anyres_max_\d{1,3}",
)  # fmt: skip
KINDS = {kind.model_type: kind for kind in (LLAVA, NEXT, ONEVISION)}

# What some LLaVA 1.5 on the hub have, too, and no code of theirs reads.
_OF_TILES = ("image_grid_pinpoints", "use_image_newline_parameter")

# Tiles of an encoder, height before width, where a config says nothing: as LlavaNextConfig has them.
_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
# LLaVA's own code also takes the first and the last of a range: "(1x1),...,(6x6)".
_RANGE = re.compile(r"\((\d{1,2})x(\d{1,2})\),.*\((\d{1,2})x(\d{1,2})\)")


def kind_of(whole: Mapping[str, object], where: str) -> LlavaKind:
    """Returns the kind of a Hugging Face config that holds a language model as ``text_config``.

    Raises
    ------
    TargetError
        ``unsupported-architecture``: another model, or one with settings that nothing here understands.
    """
    stated = whole.get("model_type")
    kind = KINDS.get(stated) if isinstance(stated, str) else None
    if kind is None:
        raise TargetError(
            "unsupported-architecture",
            "the model is not a LLaVA whose parts are known here",
            where=where,
            found=f"model_type {shown(stated)}",
            expected=f"model_type {' or '.join(KINDS)}",
        )
    table = kind.table
    fields = (*table.fields, *table.other_fields, *table.parts, *_OF_TILES)
    refuse_unknown_around(whole, fields, f"a plain {kind.model_type}", where)
    return kind


def pinpoints(whole: Mapping[str, object], kind: LlavaKind, image_size: int, where: str) -> list[list[int]]:
    """Returns the resolutions that a config lists, else those that the kind has for an encoder of this image size.

    Raises
    ------
    TargetError
        ``odd-config``.
    """
    stated = whole.get("image_grid_pinpoints")
    if stated is None:
        tiles = _every_tile(1, 1, 6, 6) if kind is ONEVISION else _TILES
        return [[image_size * high, image_size * wide] for high, wide in tiles]
    match = _RANGE.fullmatch(stated) if isinstance(stated, str) else None
    if match:
        return [[image_size * high, image_size * wide] for high, wide in _every_tile(*map(int, match.groups()))]
    pairs = stated if isinstance(stated, list) else []
    if pairs and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_size, pair)) for pair in pairs):
        return pairs
    raise TargetError(
        "odd-config",
        "`image_grid_pinpoints` in config.json cannot be used",
        where=where,
        found=shown(stated),
        expected="a list of [height, width]",
    )


def _every_tile(high: int, wide: int, highest: int, widest: int) -> tuple[tuple[int, int], ...]:
    return tuple((one, other) for one in range(high, highest + 1) for other in range(wide, widest + 1))
