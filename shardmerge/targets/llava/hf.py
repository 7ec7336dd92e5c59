"""The targets ``hf/llava``, ``hf/llava-next`` and ``hf/llava-onevision``: directories that transformers loads.

Config, tokenizer and processor files come from the pretrained text and vision models, edited as JSON. Names are the
legacy ones unless asked otherwise: the only layout that transformers 4.51 to 5.23 all load.
"""

from __future__ import annotations

from shardmerge.targets import vision_tower
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.config_numbers import JsonObject, dump, stored_dtype
from shardmerge.targets.expectation import Component, Expectation, Request, Target
from shardmerge.targets.generation_config import generation_config
from shardmerge.targets.llava import training_run
from shardmerge.targets.llava.bases import ROLES
from shardmerge.targets.llava.kinds import IMAGE_TOKEN, LLAVA, NEXT, ONEVISION, VIDEO_TOKEN, LlavaKind, pinpoints
from shardmerge.targets.llava.model import OPTIONS, LlavaModel, read_llava
from shardmerge.targets.llava.training_run import processor_source, tokenizer_source
from shardmerge.targets.text_config import text_config
from shardmerge.tensors import SideFile


def expect_kind(request: Request, kind: LlavaKind) -> Expectation:
    """Returns what the directory of a LLaVA of this kind must hold.

    Where the vocabulary is kept the text source is a LLaVA that is only renamed, and its own kind counts.

    Raises
    ------
    TargetError
        ``missing-source``, ``projector-depth``, ``unsupported-architecture``, ``odd-config``, ``contradiction``,
        ``bad-option``, ``vocabulary-rows``, or what the tokenizer and JSON files raise; all of one stage together.
    """
    model = read_llava(request, kind)
    config = config_json(model, request)
    files, warnings = processor_files(model, request)
    whole = read_architecture(config, model.text.where)
    names, tied = model.names, model.text.architecture.tied
    return Expectation(
        tensors={names.name(name): shape for name, shape in whole.tensors().items()},
        resized=model.rows.resized([names.embedding] if tied else [names.embedding, names.head]),
        tied={names.head: names.embedding} if tied else {},
        left_out=model.left_out,
        side_files=(
            SideFile("config.json", (dump(config),)),
            *generation_config(model.text.catalog, model.text.config, request.read, _pad(model)),
            *model.tokens.files,
            *files,
        ),
        beside=model.text.catalog.side_files,
        components=_components(model),
        warnings=(
            *_tokenizer_warnings(model),
            *model.wiring.warnings,
            *_tower_warnings(model),
            *_family_warnings(model),
            *warnings,
        ),
    )


def _components(model: LlavaModel) -> tuple[Component, ...]:
    players = model.players
    remedy = (
        f"name the checkpoint of the training as `{players.trained_name}`: XTuner always saves the projector with it"
    )
    kind = model.kind.model_type
    newline = Component(
        model.names.name("image_newline"), f"every {kind} has it", f"name a checkpoint of a {kind} that has it"
    )
    parts = (
        players.text.component,
        players.vision.component,
        Component(model.names.name("multi_modal_projector."), "", remedy),
    )
    return (*parts, newline) if model.kind.newline else parts


# ---- config.json


def config_json(model: LlavaModel, request: Request) -> JsonObject:
    """Returns config.json. Every value is stated, since defaults changed between versions of transformers.

    The tie flag stands in both places: 4.x reads it in ``text_config``, 5.x at the top.
    """
    text, vision, wiring = model.text, model.vision, model.wiring
    text_dtype = request.dtype.torch if request.dtype else stored_dtype(text.config)
    vision_dtype = request.dtype.torch if request.dtype else stored_dtype(vision.config)
    config: JsonObject = {
        "architectures": [model.kind.table.main_class],
        "image_token_index": model.tokens.ids[IMAGE_TOKEN],
        "model_type": model.kind.model_type,
        "multimodal_projector_bias": wiring.bias,
        "projector_hidden_act": wiring.activation,
        "text_config": text_config(text.config, text.architecture, model.rows.count, text_dtype, text.where),
        "tie_word_embeddings": text.architecture.tied,
        "vision_config": vision_tower.vision_config(vision.config, vision.architecture, vision_dtype),
        "vision_feature_layer": list(wiring.layer) if isinstance(wiring.layer, tuple) else wiring.layer,
        "vision_feature_select_strategy": wiring.strategy,
    }
    if model.kind.newline:
        config["image_grid_pinpoints"] = _pinpoints(model)
    if model.kind is ONEVISION:
        config |= {"video_token_index": model.tokens.ids[VIDEO_TOKEN], "vision_aspect_ratio": _aspect_ratio(model)}
    else:
        config["image_seq_length"] = _image_tokens(model)
    return config | _pad(model) | ({"torch_dtype": text_dtype} if text_dtype else {})


def _image_tokens(model: LlavaModel) -> int:
    """Returns the tokens that the encoder makes of one image and the language model sees."""
    vision = model.vision.architecture
    with_class = vision_tower.kind_of_tower(vision).class_token
    return vision.patches + (with_class - (model.wiring.strategy == "default"))


def _aspect_ratio(model: LlavaModel) -> str:
    """Returns how many tiles a OneVision cuts at most, under the key of the one or the other code."""
    config = model.settings.config
    stated = config.get("vision_aspect_ratio", config.get("image_aspect_ratio"))
    return stated if isinstance(stated, str) else "anyres_max_9"


def _pinpoints(model: LlavaModel) -> list[list[int]]:
    return pinpoints(model.settings.config, model.kind, model.vision.architecture.image_size, model.settings.where)


def _pad(model: LlavaModel) -> JsonObject:
    return {} if model.pad_id is None else {"pad_token_id": model.pad_id}


# ---- tokenizer and processor


def _tokenizer_warnings(model: LlavaModel) -> tuple[str, ...]:
    catalog, tokens = model.text.catalog, model.tokens
    if "tokenizer.json" in tokenizer_source(model.settings, model.text):
        return ()
    if tokens.files:
        # 4.51, 4.57 and 5.23 compared: 5.x takes its generic class for every LLaVA, whatever class is named,
        # and that one neither puts a space in front of a text nor keeps a newline.
        warning = (
            f"{catalog.path} has no tokenizer.json, and transformers 5 reads such a LLaVA's tokenizer differently "
            "from 4.x. Save the base's tokenizer with transformers 4 first: "
            "`AutoTokenizer.from_pretrained(BASE).save_pretrained(BASE)`"
        )
        return (warning,)
    numbered = " and ".join(f"`{token}` as {number}" for token, number in tokens.ids.items())
    warning = (
        f"{catalog.path} has no tokenizer files, so none are written, and {numbered} are assumed. Name a "
        "text source with a tokenizer, or copy one into the finished directory and add these tokens in order"
    )
    return (warning,)


def _tower_warnings(model: LlavaModel) -> tuple[str, ...]:
    """Two encoders of one width fit the same projector, and only one of them is the one that it was trained with."""
    started, vision = model.players.vision.path, model.vision
    if not vision_tower.is_another(started, vision.architecture):
        return ()
    sizes = f"{vision.architecture.num_layers} layers, images of {vision.architecture.image_size} pixels"
    return (
        f"the projector was trained with {started!r}, and the encoder in {vision.catalog.path} is another: {sizes}",
    )


# What a language model does only as `...ForCausalLM`, which a LLaVA has inside up to 4.51 and no longer from 4.52 on
# (4.51.3, 4.57.1 and 5.23.0 compared), or otherwise in 5.x than in 4.x.
_FAMILIES = {
    "gemma": "transformers 4.x multiplies the image features of a LLaVA over Gemma by the root of `hidden_size`, 5.x "
    "does not: load it with the one that it was trained with",
    "gemma2": "transformers 4.x multiplies the image features of a LLaVA over Gemma 2 by the root of `hidden_size`, "
    "5.x does not, and from 4.52 on `final_logit_softcapping` is not applied: load it with the one it was trained with",
    "granite": "from transformers 4.52 on a LLaVA over Granite does not divide its logits by `logits_scaling`: the "
    "order of the tokens is the same, a temperature means another one",
}


def _family_warnings(model: LlavaModel) -> tuple[str, ...]:
    said = _FAMILIES.get(model.text.architecture.model_type)
    return (said,) if said else ()


def processor_files(model: LlavaModel, request: Request) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """Returns preprocessor_config.json and processor_config.json, for OneVision one for videos too; and warnings."""
    kind, vision = model.kind, model.vision.architecture
    files = processor_source(model.settings, model.vision.catalog)
    images, warnings = vision_tower.image_processor(files, request.read, vision)
    images |= {"processor_class": kind.processor_class}
    videos: JsonObject = images | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    videos.pop("image_processor_type", None)
    if kind.newline:
        images |= {"image_grid_pinpoints": _pinpoints(model), "image_processor_type": kind.image_processor}
    processor: JsonObject = {
        "image_token": IMAGE_TOKEN,
        "processor_class": kind.processor_class,
        "vision_feature_select_strategy": model.wiring.strategy,
    }
    if kind is ONEVISION:
        videos.pop("crop_size", None)
        images |= {"do_pad": True}
        processor |= {"num_image_tokens": vision.patches, "video_token": VIDEO_TOKEN}
        processor |= {"vision_aspect_ratio": _aspect_ratio(model)}
    else:
        if kind.newline:  # its tiles have the size of the crop, which SigLIP's own image processor has none of
            square = {"height": vision.image_size, "width": vision.image_size}
            images = {"aspect_ratio_setting": "anyres", "crop_size": square} | images
        # Without this file the processor of 4.51 to 5.23 loads and fails when called, and without the additional
        # token, which is the encoder's class token, it counts one image token too few.
        class_token = int(vision_tower.kind_of_tower(vision).class_token)
        processor |= {"num_additional_image_tokens": class_token, "patch_size": vision.patch_size}
    made = {"preprocessor_config.json": images, "processor_config.json": processor}
    made |= {"video_preprocessor_config.json": videos} if kind is ONEVISION else {}
    return tuple(SideFile(name, (dump(content),)) for name, content in made.items()), warnings


def _target(name: str, kind: LlavaKind) -> Target:
    return Target(
        name=name,
        about=f"A {kind.table.title} for transformers: `{kind.table.main_class}.from_pretrained` loads it.",
        roles=ROLES | training_run.ROLES,
        options=OPTIONS,
        expect=lambda request: expect_kind(request, kind),
    )


TARGET = _target("hf/llava", LLAVA)
NEXT_TARGET = _target("hf/llava-next", NEXT)
ONEVISION_TARGET = _target("hf/llava-onevision", ONEVISION)
