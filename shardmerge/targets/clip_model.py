"""The targets ``hf/clip`` and ``hf/clip-vision``: a whole CLIPModel, and its vision tower alone.

Names are those of transformers before 5.6, which every CLIP on the hub has and every version loads. The config is
Hugging Face's own, or made from open_clip's.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.targets import open_clip_config, tokenizer, vision_tower
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import nested, read_architecture
from shardmerge.targets.config_numbers import JsonObject, dump, load_object, portable, stored_dtype
from shardmerge.targets.expectation import Expectation, Request, Target, described_by
from shardmerge.tensors import Catalog, ReadSideFile, SideFile

_OPEN_CLIP = "open_clip_config.json"


def expect_vision(request: Request) -> Expectation:
    """Returns what the directory of a CLIPVisionModel must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``unsupported-architecture``, ``odd-config``, ``bad-json``.
    """
    catalog, whole, where = _read(request, "vision")
    config = vision_tower.unwrap(whole)
    vision = vision_tower.read_vision(config, where, ("clip_vision_model",))
    dtype = request.dtype.torch if request.dtype else stored_dtype(config) or stored_dtype(whole)
    written = vision_tower.vision_config(config, vision, dtype) | {"architectures": ["CLIPVisionModel"]}
    images, warnings = _images(catalog, whole, request.read, vision)
    return Expectation(
        tensors=vision.tensors(),
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
    model = read_architecture(whole, where, ("clip",))
    dtype, parts = request.dtype.torch if request.dtype else stored_dtype(whole), model.table.parts
    written = portable(whole, dtype) | {
        "architectures": ["CLIPModel"],
        **{key: portable({**part.usual, **(nested(whole, key) or {})}, dtype) for key, part in parts.items()},
    }
    for legacy in ("text_config_dict", "vision_config_dict", open_clip_config.PREPROCESSING):
        written.pop(legacy, None)
    images, warnings = _images(catalog, whole, request.read, model.parts["vision_config"])
    return Expectation(
        tensors=model.tensors(),
        side_files=(
            SideFile("config.json", (dump(written),)),
            images,
            *tokenizer.copies(catalog.side_files),
        ),
        beside=catalog.side_files,
        components=(described_by("", where),),
        warnings=warnings,
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
        f"no source describes the CLIP: `{name}` should",
        where=known[0].path if known else request.where,
        expected=f"a source with config.json or {_OPEN_CLIP}",
        hint=request.naming(role, "<directory or hub id of a Hugging Face CLIP of the same sizes>"),
    )


def _images(
    catalog: Catalog, whole: Mapping[str, object], read: ReadSideFile, vision: Architecture
) -> tuple[SideFile, tuple[str, ...]]:
    made = whole.get(open_clip_config.PREPROCESSING)
    if isinstance(made, dict):
        return SideFile("preprocessor_config.json", (dump(made),)), ()
    images, warnings = vision_tower.image_processor(catalog.side_files, read, vision)
    return SideFile("preprocessor_config.json", (dump(images),)), warnings


VISION_TARGET = Target(
    name="hf/clip-vision",
    about="The vision tower of a CLIP for transformers: `CLIPVisionModel.from_pretrained` loads it.",
    roles={"vision": "the CLIP: its config.json, whole or of the vision part, and preprocessor_config.json"},
    options={},
    expect=expect_vision,
)

TARGET = Target(
    name="hf/clip",
    about="A complete CLIP for transformers: `CLIPModel.from_pretrained` loads it.",
    roles={"config": "what describes the CLIP: a config.json of model_type clip, or open_clip_config.json"},
    options={},
    expect=expect_model,
)
