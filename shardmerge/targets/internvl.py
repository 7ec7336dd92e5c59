"""The target ``hf/internvl``: a directory that ``InternVLForConditionalGeneration.from_pretrained`` loads.

It is described by the config.json of the original InternVLChat. Names and config follow transformers'
``convert_internvl_weights_to_hf.py`` and ``modeling_internvl.py``; the names in the files are those of the hub's
``*-hf`` models, which every version renames on loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.targets import foreign_configs, llama, tokenizer
from shardmerge.targets.architectures import (
    JsonObject,
    dimension,
    dump,
    flag,
    layers,
    load_object,
    portable,
    stored_dtype,
)
from shardmerge.targets.expectation import Component, Expectation, Request, SideFile, Target
from shardmerge.targets.llama import TextArchitecture
from shardmerge.targets.options import count
from shardmerge.tensors import Catalog, Shape

_MAX_ID = 1 << 24
# `<IMG_CONTEXT>`: the id in InternVL's Qwen2 and InternLM2 tokenizers.
_IMAGE_IDS = {"qwen2": 151667, "llama": 92546}
_IMAGE_TOKEN = "<IMG_CONTEXT>"

# Fields of the original configs that describe training, or another class's code.
_DROPPED = (
    "auto_map", "bias", "drop_path_rate", "dropout", "initializer_factor", "laux_allreduce", "model_type",
    "moe_config", "noisy_gate_policy", "qkv_bias", "qk_normalization", "use_bfloat16", "use_flash_attn",
    "attention_probs_dropout_prob", "attention_dropout", "output_attentions", "output_hidden_states",
)  # fmt: skip

# ImageNet's mean and deviation, with which InternVL is trained.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True, slots=True)
class _Encoder:
    """InternViT's sizes."""

    hidden: int
    inner: int
    layers: int
    patch: int
    image: int
    qkv_bias: bool
    rms: bool
    qk_norm: bool


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
        text_part = foreign_configs.from_internlm2(text_part)
    text = llama.read_architecture(text_part, where)
    encoder = _encoder(_part(whole, "vision_config", where), whole, where)
    shuffle = _shuffle(whole, where)
    tied = text.tied
    config = _config(request, whole, text_part, text, encoder)
    head = "language_model.lm_head.weight"
    return Expectation(
        tensors=dict(_tensors(text, encoder, shuffle)),
        tied={head: "language_model.model.embed_tokens.weight"} if tied else {},
        side_files=(
            SideFile("config.json", (dump(config),)),
            SideFile("preprocessor_config.json", (dump(_images(encoder)),)),
            *_copied(catalog, "generation_config.json"),
            *tokenizer.copies(catalog.side_files),
        ),
        beside=catalog.side_files,
        components=(Component("", "", f"Check that {where} describes these weights"),),
        warnings=(
            "the tokenizer is the original's: InternVLProcessor also needs the chat template and the names of the "
            "image tokens that the `-hf` model of the same size has in its tokenizer files",
        ),
    )


def _read(request: Request) -> tuple[Catalog, JsonObject, str]:
    name = request.roles.get("config", "config")
    catalog = request.catalogs.get(name)
    if catalog is None or "config.json" not in catalog.side_files:
        raise TargetError(
            "missing-source",
            f"no source says what the InternVL is, and `{name}` should",
            where=catalog.path if catalog else request.where,
            expected=f"a source named `{name}` with the config.json of an InternVLChat",
        )
    extent = catalog.side_files["config.json"]
    return catalog, load_object(extent, request.read), extent.file


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


def _encoder(config: Mapping[str, object], whole: Mapping[str, object], where: str) -> _Encoder:
    image = dimension(whole, "force_image_size", dimension(config, "image_size", 448, where), where)
    return _Encoder(
        hidden=dimension(config, "hidden_size", 1024, where),
        inner=dimension(config, "intermediate_size", 4096, where),
        layers=layers(config, 24, where),
        patch=dimension(config, "patch_size", 14, where),
        image=image,
        qkv_bias=flag({"qkv_bias": config.get("qkv_bias", True)}, "qkv_bias", where),
        rms=config.get("norm_type") == "rms_norm",
        qk_norm=flag(config, "qk_normalization", where),
    )


def _shuffle(whole: Mapping[str, object], where: str) -> int:
    """Returns how many patches a token takes in along each side: 1 / downsample_ratio."""
    ratio = whole.get("downsample_ratio", 0.5)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise TargetError(
            "odd-config",
            "`downsample_ratio` in config.json cannot be used",
            where=where,
            found=repr(ratio)[:80],
            expected="a number above 0, at most 1",
        )
    return int(1 / ratio)


# ---- names and shapes


def _tensors(text: TextArchitecture, encoder: _Encoder, shuffle: int) -> Iterator[tuple[str, Shape]]:
    for name, shape in llama.expected(text, text.vocab_size):
        yield f"language_model.{name}", shape
    wide = encoder.hidden * shuffle**2
    yield from _affine("multi_modal_projector.layer_norm", (wide,))
    yield from _affine("multi_modal_projector.linear_1", (text.hidden_size, wide))
    yield from _affine("multi_modal_projector.linear_2", (text.hidden_size, text.hidden_size))
    hidden, prefix = encoder.hidden, "vision_tower.embeddings"
    yield f"{prefix}.cls_token", (1, 1, hidden)
    yield f"{prefix}.position_embeddings", (1, (encoder.image // encoder.patch) ** 2 + 1, hidden)
    yield from _affine(f"{prefix}.patch_embeddings.projection", (hidden, 3, encoder.patch, encoder.patch))
    for index in range(encoder.layers):
        yield from _layer(f"vision_tower.encoder.layer.{index}", encoder)


def _layer(prefix: str, encoder: _Encoder) -> Iterator[tuple[str, Shape]]:
    hidden = encoder.hidden
    for name in ("q_proj", "k_proj", "v_proj"):
        yield from _affine(f"{prefix}.attention.{name}", (hidden, hidden), bias=encoder.qkv_bias)
    if encoder.qk_norm:
        yield f"{prefix}.attention.q_norm.weight", (hidden,)
        yield f"{prefix}.attention.k_norm.weight", (hidden,)
    yield from _affine(f"{prefix}.attention.projection_layer", (hidden, hidden))
    yield from _affine(f"{prefix}.mlp.fc1", (encoder.inner, hidden))
    yield from _affine(f"{prefix}.mlp.fc2", (hidden, encoder.inner))
    for name in ("layernorm_before", "layernorm_after"):
        yield from _affine(f"{prefix}.{name}", (hidden,), bias=not encoder.rms)
    yield f"{prefix}.lambda_1", (hidden,)
    yield f"{prefix}.lambda_2", (hidden,)


def _affine(name: str, shape: Shape, *, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


# ---- files


def _config(
    request: Request,
    whole: Mapping[str, object],
    text_part: Mapping[str, object],
    text: TextArchitecture,
    encoder: _Encoder,
) -> JsonObject:
    dtype = request.dtype.torch if request.dtype else stored_dtype(whole)
    vision = {key: value for key, value in _vision_part(whole).items() if key not in _DROPPED}
    language = {key: value for key, value in text_part.items() if key not in ("moe_config", "use_cache")}
    config: JsonObject = {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": whole.get("downsample_ratio", 0.5),
        "image_seq_length": (encoder.image // encoder.patch // _shuffle(whole, "")) ** 2,
        "image_token_id": count(request, "image_token_id", _IMAGE_IDS.get(text.model_type, 92546), most=_MAX_ID),
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": llama.text_config(language, text, text.vocab_size, dtype, ""),
        "tie_word_embeddings": text.tied,
        "vision_config": portable(vision, dtype)
        | {
            "attention_bias": encoder.qkv_bias,
            "image_size": [encoder.image, encoder.image],
            "model_type": "internvl_vision",
            "patch_size": [encoder.patch, encoder.patch],
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
            "use_qk_norm": encoder.qk_norm,
        },
        "vision_feature_layer": whole.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
    }
    return config | ({"torch_dtype": dtype} if dtype else {})


def _vision_part(whole: Mapping[str, object]) -> Mapping[str, object]:
    value = whole.get("vision_config")
    return value if isinstance(value, dict) else {}


def _images(encoder: _Encoder) -> JsonObject:
    """What the converter's image processor saves."""
    return {
        "crop_to_patches": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _MEAN,
        "image_processor_type": "GotOcr2ImageProcessor",
        "image_std": _STD,
        "max_patches": 12,
        "min_patches": 1,
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": encoder.image, "width": encoder.image},
    }


def _copied(catalog: Catalog, name: str) -> tuple[SideFile, ...]:
    return (SideFile(name, (catalog.side_files[name],)),) if name in catalog.side_files else ()


TARGET = Target(
    name="hf/internvl",
    about="An InternVL for transformers: `InternVLForConditionalGeneration.from_pretrained` loads it.",
    roles={"config": "the original InternVLChat: config.json and tokenizer files"},
    options={"image_token_id": f"the id of `{_IMAGE_TOKEN}`, where it is not that of InternVL 2.5 and 3"},
    expect=expect,
)
