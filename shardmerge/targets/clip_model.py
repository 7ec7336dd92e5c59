"""The targets ``hf/clip`` and ``hf/clip-vision``: a whole CLIPModel, and its vision tower alone.

Names and shapes follow ``modeling_clip.py`` of transformers before 5.6, which every CLIP on the hub has and every
version loads. The config is Hugging Face's own, or made from open_clip's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets import clip, open_clip_config, tokenizer
from shardmerge.targets.architectures import JsonObject, dimension, dump, layers, load_object, portable, stored_dtype
from shardmerge.targets.clip import VisionArchitecture
from shardmerge.targets.expectation import Expectation, Request, Target, described_by
from shardmerge.tensors import Catalog, ReadSideFile, Shape, SideFile

_OPEN_CLIP = "open_clip_config.json"
_DEFAULT_PROJECTION = 512


def expect_vision(request: Request) -> Expectation:
    """Returns what the directory of a CLIPVisionModel must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``unsupported-architecture``, ``odd-config``, ``bad-json``.
    """
    catalog, whole, where = _read(request, "vision")
    config = clip.unwrap(whole)
    vision = clip.read_architecture(config, where)
    dtype = request.dtype.torch if request.dtype else stored_dtype(config) or stored_dtype(whole)
    written = clip.vision_config(config, dtype) | {"architectures": ["CLIPVisionModel"]}
    images, warnings = _images(catalog, whole, request.read, vision)
    return Expectation(
        tensors=dict(clip.expected(vision)),
        side_files=(SideFile("config.json", (dump(written),)), images),
        beside=catalog.side_files,
        components=(described_by("vision_model.", where),),
        warnings=warnings,
    )


def expect_model(request: Request) -> Expectation:
    """Returns what the directory of a CLIPModel must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``unsupported-architecture``, ``odd-config``, ``bad-json``.
    """
    catalog, whole, where = _read(request, "config")
    vision_part, text_part = clip.unwrap(whole), read_text_part(whole, where)
    _check_kind(text_part, where)
    vision = clip.read_architecture(vision_part, where)
    dtype = request.dtype.torch if request.dtype else stored_dtype(whole)
    written = portable(whole, dtype) | {
        "architectures": ["CLIPModel"],
        "text_config": portable(text_part, dtype),
        "vision_config": clip.vision_config(vision_part, dtype),
    }
    for legacy in ("text_config_dict", "vision_config_dict", open_clip_config.PREPROCESSING):
        written.pop(legacy, None)
    images, warnings = _images(catalog, whole, request.read, vision)
    return Expectation(
        tensors=dict(_model_tensors(whole, text_part, vision, where)),
        side_files=(
            SideFile("config.json", (dump(written),)),
            images,
            *tokenizer.copies(catalog.side_files),
        ),
        beside=catalog.side_files,
        components=(described_by("", where),),
        warnings=warnings,
    )


def _check_kind(text: Mapping[str, object], where: str) -> None:
    """A CLIP's text encoder is a CLIP's: what is named otherwise has other names, or another arithmetic."""
    if text.get("model_type") != "clip_text_model":
        raise TargetError(
            "unsupported-architecture",
            "the text encoder of this CLIP is not a CLIP's",
            where=where,
            found=f"model_type {shown(text.get('model_type'))} in text_config",
            expected="model_type 'clip_text_model'",
        )


# ---- reading


def _read(request: Request, role: str) -> tuple[Catalog, JsonObject, str]:
    """Returns the source that describes the CLIP, its config as Hugging Face writes it, and the file that has it."""
    name = request.roles.get(role, role)
    known = [request.catalogs[each] for each in (name, role) if each in request.catalogs]
    for catalog in known:
        for file in ("config.json", _OPEN_CLIP):
            if file not in catalog.side_files:
                continue
            extent = catalog.side_files[file]
            found = load_object(extent, request.read)
            if open_clip_config.is_open_clip(found):
                return catalog, open_clip_config.to_clip_config(found, extent.file), extent.file
            if "model_type" in found or "vision_config" in found:
                return catalog, found, extent.file
    raise TargetError(
        "missing-source",
        f"no source says what the CLIP is, and `{name}` should",
        where=known[0].path if known else request.where,
        expected=f"a source with config.json or {_OPEN_CLIP}",
        hint=f"{role}: <directory or hub id of a Hugging Face CLIP of the same sizes>",
    )


def read_text_part(whole: Mapping[str, object], where: str) -> JsonObject:
    """Returns the text part of a full CLIP's config; ``text_config_dict`` of 2022 wins, as for the vision part."""
    nested, legacy = whole.get("text_config"), whole.get("text_config_dict")
    if whole.get("model_type") != "clip" or not (isinstance(nested, dict) or isinstance(legacy, dict)):
        raise TargetError(
            "unsupported-architecture",
            "the config is not one of a whole CLIP",
            where=where,
            found=f"model_type {whole.get('model_type')!r}"[:120],
            expected="model_type clip, with text_config and vision_config",
        )
    merged = {**(nested if isinstance(nested, dict) else {}), **(legacy if isinstance(legacy, dict) else {})}
    return {"model_type": "clip_text_model"} | merged


def _images(
    catalog: Catalog, whole: Mapping[str, object], read: ReadSideFile, vision: VisionArchitecture
) -> tuple[SideFile, tuple[str, ...]]:
    made = whole.get(open_clip_config.PREPROCESSING)
    if isinstance(made, dict):
        return SideFile("preprocessor_config.json", (dump(made),)), ()
    images, warnings = clip.image_processor(catalog.side_files, read, vision)
    return SideFile("preprocessor_config.json", (dump(images),)), warnings


# ---- names and shapes


def _model_tensors(
    whole: Mapping[str, object], text: Mapping[str, object], vision: VisionArchitecture, where: str
) -> Iterator[tuple[str, Shape]]:
    projection = dimension(whole, "projection_dim", _DEFAULT_PROJECTION, where)
    hidden = dimension(text, "hidden_size", 512, where)
    yield "logit_scale", ()
    yield "text_projection.weight", (projection, hidden)
    yield "visual_projection.weight", (projection, vision.hidden_size)
    yield from clip.expected(vision)
    yield from text_tensors(text, where)


def text_tensors(text: Mapping[str, object], where: str) -> Iterator[tuple[str, Shape]]:
    """Yields the names and shapes of the text encoder; defaults follow ``CLIPTextConfig``."""
    prefix, hidden = "text_model", dimension(text, "hidden_size", 512, where)
    yield f"{prefix}.embeddings.token_embedding.weight", (dimension(text, "vocab_size", 49408, where), hidden)
    positions = dimension(text, "max_position_embeddings", 77, where)
    yield f"{prefix}.embeddings.position_embedding.weight", (positions, hidden)
    inner = dimension(text, "intermediate_size", 2048, where)
    for index in range(layers(text, 12, where)):
        yield from clip.encoder_layer(f"{prefix}.encoder.layers.{index}", hidden, inner)
    yield from clip.norm(f"{prefix}.final_layer_norm", hidden)


VISION_TARGET = Target(
    name="hf/clip-vision",
    about="A CLIP's vision tower for transformers: `CLIPVisionModel.from_pretrained` loads it.",
    roles={"vision": "the CLIP: its config.json, whole or of the vision part, and preprocessor_config.json"},
    options={},
    expect=expect_vision,
)

TARGET = Target(
    name="hf/clip",
    about="A whole CLIP for transformers: `CLIPModel.from_pretrained` loads it.",
    roles={"config": "what describes the CLIP: a config.json of model_type clip, or open_clip_config.json"},
    options={},
    expect=expect_model,
)
