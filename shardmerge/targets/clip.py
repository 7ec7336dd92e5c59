"""CLIP's vision encoder: expected names and shapes, its config, and the file of its image processor.

Names and shapes follow ``modeling_clip.py`` of transformers before 5.6, which is also what every CLIP
checkpoint on the hub holds; 5.6 and later read them with a renaming. Defaults follow ``CLIPVisionConfig``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.targets.architectures import JsonObject, dimension, layers, load_object, portable
from shardmerge.tensors import Extent, ReadSideFile, Shape

_DEFAULT_HIDDEN, _DEFAULT_INNER, _DEFAULT_LAYERS = 768, 3072, 12
_DEFAULT_IMAGE, _DEFAULT_PATCH, _DEFAULT_CHANNELS = 224, 32, 3


@dataclass(frozen=True, slots=True)
class VisionArchitecture:
    """The sizes of a CLIP vision encoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    channels: int
    image_size: int
    patch_size: int

    @property
    def patches(self) -> int:
        """Patches of one image, which is also the number of its tokens in the text."""
        return (self.image_size // self.patch_size) ** 2


def unwrap(config: Mapping[str, object]) -> JsonObject:
    """Returns the vision part of a config: its nested ``vision_config`` where there is one, else the whole.

    Configs of 2022 also have ``vision_config_dict``, and ``CLIPConfig`` lets that one win.
    """
    nested, legacy = config.get("vision_config"), config.get("vision_config_dict")
    if not isinstance(nested, dict) and not isinstance(legacy, dict):
        return dict(config)
    merged = {**(nested if isinstance(nested, dict) else {}), **(legacy if isinstance(legacy, dict) else {})}
    # The vision part of a full CLIP does not always say what it is.
    return {"model_type": "clip_vision_model"} | merged if config.get("model_type") == "clip" else merged


def read_architecture(config: Mapping[str, object], where: str) -> VisionArchitecture:
    """Returns the sizes that a CLIP vision config implies.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, or ``odd-config`` for a size that is no size.
    """
    if config.get("model_type") != "clip_vision_model":
        raise TargetError(
            "unsupported-architecture",
            "the vision encoder's architecture is not one whose tensors are known here",
            where=where,
            found=f"model_type {config.get('model_type')!r}"[:120],
            expected="model_type clip_vision_model, or clip with a nested vision_config",
        )
    vision = VisionArchitecture(
        hidden_size=dimension(config, "hidden_size", _DEFAULT_HIDDEN, where),
        intermediate_size=dimension(config, "intermediate_size", _DEFAULT_INNER, where),
        num_layers=layers(config, _DEFAULT_LAYERS, where),
        channels=dimension(config, "num_channels", _DEFAULT_CHANNELS, where),
        image_size=dimension(config, "image_size", _DEFAULT_IMAGE, where),
        patch_size=dimension(config, "patch_size", _DEFAULT_PATCH, where),
    )
    if vision.patch_size > vision.image_size:
        raise TargetError(
            "odd-config",
            "`patch_size` in config.json is larger than the image",
            where=where,
            found=f"patch_size {vision.patch_size}",
            expected=f"at most image_size {vision.image_size}",
        )
    return vision


def expected(vision: VisionArchitecture) -> Iterator[tuple[str, Shape]]:
    """Yields every name of the encoder with its shape; ``position_ids`` is a buffer that is not saved."""
    hidden = vision.hidden_size
    yield "vision_model.embeddings.class_embedding", (hidden,)
    patch = (hidden, vision.channels, vision.patch_size, vision.patch_size)
    yield "vision_model.embeddings.patch_embedding.weight", patch
    yield "vision_model.embeddings.position_embedding.weight", (vision.patches + 1, hidden)
    yield from norm("vision_model.pre_layrnorm", hidden)  # sic: the name in every checkpoint
    for index in range(vision.num_layers):
        yield from encoder_layer(f"vision_model.encoder.layers.{index}", hidden, vision.intermediate_size)
    yield from norm("vision_model.post_layernorm", hidden)


def encoder_layer(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    """Yields the names and shapes of a layer, which CLIP's two encoders have in common."""
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield from _linear(f"{prefix}.self_attn.{name}", hidden, hidden)
    yield from norm(f"{prefix}.layer_norm1", hidden)
    yield from _linear(f"{prefix}.mlp.fc1", inner, hidden)
    yield from _linear(f"{prefix}.mlp.fc2", hidden, inner)
    yield from norm(f"{prefix}.layer_norm2", hidden)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def norm(name: str, size: int) -> Iterator[tuple[str, Shape]]:
    """Yields the names and shapes of a LayerNorm."""
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def vision_config(config: Mapping[str, object], dtype: str) -> JsonObject:
    """Returns the ``vision_config`` of a LLaVA config.json."""
    return portable(config, dtype) | {"model_type": "clip_vision_model"}


def image_processor(
    side_files: Mapping[str, Extent], read: ReadSideFile, vision: VisionArchitecture
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


def is_another(path: str, vision: VisionArchitecture) -> bool:
    """Whether a path or hub id names a published CLIP of other sizes than these."""
    known = _PUBLISHED.get(_last_part(path))
    return known is not None and known != (vision.num_layers, vision.image_size)


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
