"""The target ``hf/llava-next``: a directory that ``LlavaNextForConditionalGeneration.from_pretrained`` loads.

LLaVA 1.6 is a LLaVA 1.5 that cuts a large image into tiles: one tensor more, ``image_newline``, and a list of the
resolutions that tiles may add up to.
"""

from __future__ import annotations

from shardmerge.targets import clip
from shardmerge.targets.bases import ROLES
from shardmerge.targets.expectation import Expectation, Request, Target
from shardmerge.targets.llava import OPTIONS, Kind, Model, assemble, config_json, read_model, two_files

NEXT = Kind("llava_next", "LlavaNextForConditionalGeneration", "LlavaNextProcessor", newline=True)

# Tiles of a 336 pixel encoder, height before width: what LlavaNextConfig has where a config says nothing.
_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def expect(request: Request) -> Expectation:
    """Returns what the finished LLaVA-NeXT directory must hold.

    Raises
    ------
    TargetError
        As ``hf/llava``.
    """
    model = read_model(request, NEXT)
    pinpoints = _pinpoints(model)
    config = config_json(model, request) | {"image_grid_pinpoints": pinpoints}
    images, warnings = clip.image_processor(model.vision.catalog.side_files, request.read, model.vision.architecture)
    images |= {
        "aspect_ratio_setting": "anyres",
        "image_grid_pinpoints": pinpoints,
        "image_processor_type": "LlavaNextImageProcessor",
    }
    return assemble(model, request, config, two_files(model, images), warnings)


def _pinpoints(model: Model) -> list[list[int]]:
    """Returns the resolutions that the text base's config lists, else those of LLaVA 1.6 for this encoder."""
    stated = model.text.whole.get("image_grid_pinpoints")
    if isinstance(stated, list):
        pairs = [pair for pair in stated if isinstance(pair, list) and len(pair) == 2]
        if pairs and len(pairs) == len(stated) and all(isinstance(size, int) for pair in pairs for size in pair):
            return pairs
    size = model.vision.architecture.image_size
    return [[size * high, size * wide] for high, wide in _TILES]


TARGET = Target(
    name="hf/llava-next",
    about="A LLaVA 1.6 (NeXT) for transformers: `LlavaNextForConditionalGeneration.from_pretrained` loads it.",
    roles=ROLES,
    options=OPTIONS,
    expect=expect,
)
