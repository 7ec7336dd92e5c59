"""CLIP's vision encoder: its config, and the file of its image processor."""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import nested, read_architecture
from shardmerge.targets.config_numbers import JsonObject, load_object, portable
from shardmerge.tensors import Extent, ReadSideFile

VISIONS = ("clip_vision_model",)


def unwrap(config: Mapping[str, object]) -> JsonObject:
    """Returns the vision part of a config: its nested ``vision_config`` where there is one, else the whole."""
    # The vision part of a full CLIP does not always say what it is.
    part, usual = nested(config, "vision_config"), {"model_type": "clip_vision_model"}
    return dict(config) if part is None else (usual if config.get("model_type") == "clip" else {}) | part


def read_vision(config: Mapping[str, object], where: str) -> Architecture:
    """Returns the sizes that a CLIP vision config implies.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, or ``odd-config`` for a size that is no size.
    """
    return read_architecture(config, where, VISIONS)


def vision_config(config: Mapping[str, object], dtype: str) -> JsonObject:
    """Returns the ``vision_config`` of a LLaVA config.json."""
    return portable(config, dtype) | {"model_type": "clip_vision_model"}


def image_processor(
    side_files: Mapping[str, Extent], read: ReadSideFile, vision: Architecture
) -> tuple[JsonObject, tuple[str, ...]]:
    """Returns the content of preprocessor_config.json, and warnings.

    It is the encoder's own where it has one: as preprocessor_config.json, or, saved by transformers 5, inside
    of processor_config.json.
    """
    found = _own_processor(side_files, read)
    if found is None:
        warning = (
            "the vision source has no preprocessor_config.json: CLIP's standard one is written, for images "
            f"of {vision.image_size} pixels. Check it if the training used another image processor"
        )
        return _standard_processor(vision.image_size), (warning,)
    found.pop("feature_extractor_type", None)  # the name of 2022
    kind = found.get("image_processor_type")
    # Fast and Pil name backends of single transformers versions; every version finds its own from the plain
    # name.
    if not isinstance(kind, str) or kind.startswith("CLIP"):
        found["image_processor_type"] = "CLIPImageProcessor"
    return found, ()


def _own_processor(side_files: Mapping[str, Extent], read: ReadSideFile) -> JsonObject | None:
    if "preprocessor_config.json" in side_files:
        return load_object(side_files["preprocessor_config.json"], read)
    if "processor_config.json" in side_files:
        nested = load_object(side_files["processor_config.json"], read).get("image_processor")
        return dict(nested) if isinstance(nested, dict) else None
    return None


def _standard_processor(size: int) -> JsonObject:
    """What ``CLIPImageProcessor`` saves; mean and deviation are those of OpenAI's training set
    (``OPENAI_CLIP_MEAN``).
    """
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
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
    """Whether a path or hub id names a published CLIP of other sizes than these."""
    known = _PUBLISHED.get(_last_part(path))
    return known is not None and known != (vision.num_layers, vision.image_size)


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
