"""The target ``hf/internvl``: a directory that ``InternVLForConditionalGeneration.from_pretrained`` loads.

It is described by the config.json of the original InternVLChat. Names and config follow transformers'
``convert_internvl_weights_to_hf.py`` and ``modeling_internvl.py``; the names in the files are those of the hub's
``*-hf`` models, which every version renames on loading.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.targets import rewritten_configs, tokenizer
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.config_numbers import JsonObject, dimension, dump, load_object, portable, stored_dtype
from shardmerge.targets.expectation import Expectation, Request, Target, described_by
from shardmerge.targets.internvl_config import check_whole, read_shuffle, vision_config
from shardmerge.targets.options import bad_option, config_of, whole_number
from shardmerge.targets.text_config import read_part, text_config
from shardmerge.targets.vision_tower import TowerKind, standard_processor
from shardmerge.targets.vocabulary import check_ids
from shardmerge.tensors import Catalog, SideFile

_MAX_ID = 1 << 24
# `<IMG_CONTEXT>`: the id in the published models' tokenizers, for weights that come without one.
_IMAGE_IDS = {"qwen2": 151667, "llama": 92546}
_IMAGE_TOKEN = "<IMG_CONTEXT>"

# ImageNet's mean and deviation, with which InternVL is trained.
_IMAGES = TowerKind(
    "InternViT", False, "GotOcr2ImageProcessor", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=False
)

# The language models that InternVL 1.5 to 3 have, an InternLM2 as the LLaMA that it is.
_TEXTS = ("llama", "mistral", "qwen2")


def expect(request: Request) -> Expectation:
    """Returns what the finished directory must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``unsupported-architecture``, ``odd-config``, ``bad-json``, ``bad-option``.
    """
    catalog, whole, where = _read(request)
    text_part = _part(whole, "llm_config", where)
    if text_part.get("model_type") == "internlm2":
        text_part = rewritten_configs.from_internlm2(text_part, where)
    text = read_part(text_part, where, _TEXTS)
    vision = vision_config(_part(whole, "vision_config", where), whole, where)
    encoder = read_architecture(vision, where)
    shuffle, shuffle_warnings = read_shuffle(whole, where)
    image_id, id_warnings = _image_id(request, catalog, text, where)
    config = _config(request, whole, text_part, text, vision) | {"image_token_id": image_id}
    config["image_seq_length"] = encoder.patches // shuffle**2
    model = read_architecture(config, where)
    return Expectation(
        tensors=model.tensors(),
        tied=model.ties,
        side_files=(
            SideFile("config.json", (dump(config),)),
            SideFile("preprocessor_config.json", (dump(_images(encoder.image_size, whole, where)),)),
            *_copied(catalog, "generation_config.json"),
            *tokenizer.copies(catalog.side_files),
        ),
        beside=catalog.side_files,
        components=(described_by("", where),),
        warnings=(
            *shuffle_warnings,
            *id_warnings,
            "the tokenizer is the original's: InternVLProcessor also needs the chat template and the names of the "
            "image tokens that the `-hf` model of the same size has in its tokenizer files",
        ),
    )


def _read(request: Request) -> tuple[Catalog, JsonObject, str]:
    said = "the config.json of an InternVLChat"
    catalog, extent = config_of(request, "config", "says what the InternVL is", said)
    whole = load_object(extent, request.read)
    check_whole(whole, extent.file)
    return catalog, whole, extent.file


def _part(whole: Mapping[str, object], key: str, where: str) -> JsonObject:
    value = whole.get(key)
    if isinstance(value, dict):
        return value
    raise TargetError(
        "unsupported-architecture",
        "the config is not one of an original InternVLChat",
        where=where,
        found=f"model_type {whole.get('model_type')!r}, no {key}"[:120],
        expected="model_type internvl_chat, with llm_config and vision_config",
    )


def _image_id(request: Request, catalog: Catalog, text: Architecture, where: str) -> tuple[int, tuple[str, ...]]:
    """Returns the id of ``<IMG_CONTEXT>``: the tokenizer's; where there is none the option's, or the published one."""
    known = tokenizer.token_id(catalog.side_files, request.read, _IMAGE_TOKEN)
    stated = (
        whole_number(request, "image_token_id", known or 1, most=_MAX_ID)
        if "image_token_id" in request.options
        else None
    )
    if known is not None and stated not in (None, known):
        raise bad_option(request, "image_token_id", str(stated), f"{known}, which is what the tokenizer has")
    found = known if known is not None else stated
    if found is not None:
        check_ids({_IMAGE_TOKEN: found}, text.vocab_size, where, "put the tokenizer of these weights beside them")
        return found, ()
    if tokenizer.has_tokenizer(catalog.side_files):
        raise TargetError(
            "token-id",
            f"the tokenizer has no `{_IMAGE_TOKEN}`, the token that stands for an image",
            where=catalog.path,
            expected=f"the tokenizer of the InternVLChat, which has `{_IMAGE_TOKEN}`",
            hint="put the tokenizer of these weights beside them; or name the token that is used instead, e.g. "
            "`target: {name: hf/internvl, config: SOURCE, image_token_id: 151667}`",
        )
    assumed = _IMAGE_IDS.get(text.model_type, 92546)
    beyond = f", which is beyond the {text.vocab_size} rows of this one" if assumed >= text.vocab_size else ""
    warning = (
        f"{catalog.path} has no tokenizer, and image_token_id {assumed} of the published models is assumed{beyond}. "
        f"Put the tokenizer's files beside the weights, or set the target's option `image_token_id`"
    )
    return assumed, (warning,)


# ---- files


def _config(
    request: Request,
    whole: Mapping[str, object],
    text_part: Mapping[str, object],
    text: Architecture,
    vision: Mapping[str, object],
) -> JsonObject:
    dtype = request.dtype.torch if request.dtype else stored_dtype(whole)
    language = {key: value for key, value in text_part.items() if key not in ("moe_config", "use_cache")}
    config: JsonObject = {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": whole.get("downsample_ratio", 0.5),
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text_config(language, text, text.vocab_size, dtype, ""),
        "tie_word_embeddings": text.tied,
        "vision_config": portable(vision, dtype),
        "vision_feature_layer": whole.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
    }
    return config | ({"torch_dtype": dtype} if dtype else {})


def _images(size: int, whole: Mapping[str, object], where: str) -> JsonObject:
    """What the converter's image processor saves, with the numbers of tiles that the config says."""
    return standard_processor(_IMAGES, size) | {
        "crop_to_patches": False,
        "max_patches": dimension(whole, "max_dynamic_patch", 12, where),
        "min_patches": dimension(whole, "min_dynamic_patch", 1, where),
        "processor_class": "InternVLProcessor",
    }


def _copied(catalog: Catalog, name: str) -> tuple[SideFile, ...]:
    return (SideFile(name, (catalog.side_files[name],)),) if name in catalog.side_files else ()


TARGET = Target(
    name="hf/internvl",
    about="An InternVL for transformers: `InternVLForConditionalGeneration.from_pretrained` loads it.",
    roles={"config": "the original InternVLChat: config.json and tokenizer files"},
    options={"image_token_id": f"the id of `{_IMAGE_TOKEN}`, where no tokenizer lies beside the weights"},
    expect=expect,
)
