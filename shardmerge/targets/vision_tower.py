"""The visual encoders that a Hugging Face LLaVA can have, and the file of the image processor of each.

``LlavaForConditionalGeneration`` takes any encoder of AutoModel that makes hidden states of an image alone. SigLIP 2 of
any image size (``siglip2_vision_model``) also wants a mask and shapes, which no LLaVA gives it; those of one size are
``siglip_vision_model``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import nested, read_architecture
from shardmerge.targets.config_numbers import JsonObject, load_object, portable
from shardmerge.tensors import Extent, ReadSideFile


@dataclass(frozen=True, slots=True)
class TowerKind:
    """What sets one kind of encoder apart from another.

    Attributes
    ----------
    title
        For people.
    class_token
        Whether a token stands before those of the patches.
    processor
        The class of its image processor; single versions of transformers have names of their own for it (``Fast``,
        ``Pil``), which begin alike.
    mean, deviation
        Of a pixel, by channel, in the images that it was trained with.
    crop
        Whether the middle of the image is cut out; else it is squeezed into a square.
    """

    title: str
    class_token: bool
    processor: str
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    crop: bool


# OPENAI_CLIP_MEAN, IMAGENET_STANDARD_MEAN and IMAGENET_DEFAULT_MEAN of transformers, and what each kind's published
# preprocessor_config.json says.
TOWERS = {
    "clip_vision_model": TowerKind(
        "CLIP",
        True,
        "CLIPImageProcessor",
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        True,
    ),
    "siglip_vision_model": TowerKind(
        "SigLIP", False, "SiglipImageProcessor", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop=False
    ),
    "dinov2": TowerKind("DINOv2", True, "BitImageProcessor", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=True),
}

# A pair of encoders does not always say what its vision part is.
_PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def unwrap(config: Mapping[str, object]) -> JsonObject:
    """Returns the vision part of a config: its nested ``vision_config`` where there is one, else the whole."""
    part, pair = nested(config, "vision_config"), _PAIRS.get(str(config.get("model_type")))
    return dict(config) if part is None else ({"model_type": pair} if pair else {}) | part


def read_vision(config: Mapping[str, object], where: str, known: Collection[str] = tuple(TOWERS)) -> Architecture:
    """Returns the sizes that an encoder's config implies.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, or ``odd-config`` for a size that is no size.
    """
    return read_architecture(config, where, known)


def vision_config(config: Mapping[str, object], vision: Architecture, dtype: str) -> JsonObject:
    """Returns the ``vision_config`` of a LLaVA config.json."""
    return portable(config, dtype) | {"model_type": vision.model_type}


def kind_of_tower(vision: Architecture) -> TowerKind:
    """Returns what kind of encoder this is."""
    return TOWERS[vision.model_type]


# ---- the image processor


def image_processor(
    side_files: Mapping[str, Extent], read: ReadSideFile, vision: Architecture
) -> tuple[JsonObject, tuple[str, ...]]:
    """Returns the content of preprocessor_config.json, and warnings.

    It is the encoder's own where it has one: as preprocessor_config.json, or, saved by transformers 5, inside
    of processor_config.json.
    """
    kind, found = kind_of_tower(vision), _own_processor(side_files, read)
    if found is None:
        warning = (
            f"the vision source has no preprocessor_config.json: {kind.title}'s standard one is written, for images "
            f"of {vision.image_size} pixels. Check it if the training used another image processor"
        )
        return standard_processor(kind, vision.image_size), (warning,)
    found.pop("feature_extractor_type", None)  # the name of 2022
    stated = found.get("image_processor_type")
    # Fast and Pil name backends of single transformers versions; every version finds its own from the plain
    # name.
    if not isinstance(stated, str) or stated.startswith(kind.processor):
        found["image_processor_type"] = kind.processor
    return found, ()


def _own_processor(side_files: Mapping[str, Extent], read: ReadSideFile) -> JsonObject | None:
    if "preprocessor_config.json" in side_files:
        return load_object(side_files["preprocessor_config.json"], read)
    if "processor_config.json" in side_files:
        inside = load_object(side_files["processor_config.json"], read).get("image_processor")
        return dict(inside) if isinstance(inside, dict) else None
    return None


def standard_processor(kind: TowerKind, size: int) -> JsonObject:
    """Returns what an image processor of this kind saves."""
    square = {"height": size, "width": size}
    return {
        **({"crop_size": square, "do_center_crop": True} if kind.crop else {}),
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(kind.mean),
        "image_processor_type": kind.processor,
        "image_std": list(kind.deviation),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size} if kind.crop else square,
    }


# Encoder layers and image sizes of the CLIPs that OpenAI published (config.json of openai/clip-vit-*), by the last part
# of their name.
_PUBLISHED = {
    "clip-vit-base-patch16": (12, 224),
    "clip-vit-base-patch32": (12, 224),
    "clip-vit-large-patch14": (24, 224),
    "clip-vit-large-patch14-336": (24, 336),
}


def published_tensor_count(path: str) -> int:
    """Returns the tensors of a published CLIP's vision tower, known by name alone; 0 for any other."""
    layers, _ = _PUBLISHED.get(_last_part(path), (0, 0))
    # Three embeddings, two norms around the layers with weight and bias, and 16 tensors a layer.
    return 16 * layers + 7 if layers else 0


def is_another(path: str, vision: Architecture) -> bool:
    """Whether a path or hub id names a published CLIP of other sizes than these, or another kind of encoder."""
    known = _PUBLISHED.get(_last_part(path))
    return known is not None and known != (vision.num_layers, vision.image_size)


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
