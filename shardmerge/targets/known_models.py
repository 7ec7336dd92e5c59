"""The models whose every tensor is known here, from a published config.json: names, shapes, and what else may be there.

One entry a class of transformers. Names are compared in the form that the hub's files have; what versions of
transformers call the same tensor otherwise (facts of 4.36 to 5.24) is brought to that form first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets import clip, clip_model, internvl, internvl_config, llama
from shardmerge.targets.architectures import JsonObject, dimension, flag, layers
from shardmerge.tensors import Shape

Canonical: TypeAlias = Callable[[str], str]
_WeightsReader: TypeAlias = "Callable[[Mapping[str, object], frozenset[str], str], Known | None]"

# Buffers that earlier versions saved and that every version ignores.
_BUFFERS = (".inv_freq", ".position_ids", ".masked_bias")


@dataclass(frozen=True, slots=True)
class Known:
    """What the weights of a config must be.

    Attributes
    ----------
    tensors
        Every name that must be there, with its shape.
    optional
        Names that may be there, with their shapes: the head of a tied model.
    owned
        Prefixes under which there is nothing else. A name outside of them (a value head) is not the model's, and is
        ignored on loading.
    canonical
        Brings a name as a file has it to the form of ``tensors``.
    """

    tensors: Mapping[str, Shape]
    owned: tuple[str, ...]
    optional: Mapping[str, Shape] = field(default_factory=dict)
    canonical: Canonical = str

    def is_own(self, name: str) -> bool:
        """Whether a canonical name that the model does not have contradicts the config."""
        return name.startswith(self.owned) and not name.endswith(_BUFFERS)

    def is_foreign(self, name: str) -> bool:
        """Whether a canonical name is of something else than the model."""
        return not name.startswith(self.owned) and not name.endswith(_BUFFERS)


def known_model(config: Mapping[str, object], names: Iterable[str], where: str) -> Known | None:
    """Returns what the weights of a config.json must be, or None for a model that is not known here.

    Parameters
    ----------
    config
        Of the published directory.
    names
        Of the tensors beside it: a base model's files lack the prefix that the same model with a head has.
    where
        The config's file, for messages.

    Raises
    ------
    TargetError
        ``odd-config``: a size that is no size, heads that do not divide.
    """
    if "quantization_config" in config or "auto_map" in config:  # other shapes; code of the model's own
        return None
    kind = _class_of(config)
    make = _CLASSES.get(kind)
    return make(config, frozenset(names), where) if make else None


def _class_of(config: Mapping[str, object]) -> str:
    """Returns the class that loads the config: the stated one, else what ``AutoModel`` takes for the model type."""
    stated = config.get("architectures")
    if isinstance(stated, list) and stated:
        return stated[0] if isinstance(stated[0], str) else ""
    model_type = config.get("model_type")
    return _DEFAULT_CLASSES.get(model_type, "") if isinstance(model_type, str) else ""


def _dividing(hidden: int, heads: int, where: str) -> None:
    if hidden % heads:
        raise TargetError(
            "odd-config",
            "`hidden_size` in config.json is not a multiple of `num_attention_heads`",
            where=where,
            found=f"{hidden} and {heads}",
            hint=f"correct the one of the two that does not describe these weights in {where}",
        )


# ---- text models of the LLaMA layout


def _text_part(config: Mapping[str, object], prefix: str, where: str, *, tied: bool = False) -> Known:
    """Returns a causal language model whose names begin with ``prefix``."""
    text = llama.read_architecture(config, where)
    if "head_dim" not in config:
        _dividing(text.hidden_size, text.heads, where)
    names = dict(llama.expected(text, text.vocab_size))
    head = {"lm_head.weight": (text.vocab_size, text.hidden_size)}
    optional = head if tied or text.tied else {}
    tensors = {name: shape for name, shape in names.items() if name not in optional}
    return Known(
        {prefix + name: shape for name, shape in tensors.items()},
        (f"{prefix}model.", f"{prefix}lm_head."),
        {prefix + name: shape for name, shape in optional.items()},
    )


def _language_model(model_type: str, head: str) -> _WeightsReader:
    """Returns the reader of a class: ``lm_head`` of a causal model, ``score`` of a classifier, or no head at all."""

    def read(config: Mapping[str, object], names: frozenset[str], where: str) -> Known | None:
        if config.get("model_type") != model_type:  # Exaone loads as LlamaForCausalLM and is another model
            return None
        whole = _text_part(config, "", where)
        backbone = {name: shape for name, shape in whole.tensors.items() if name != "lm_head.weight"}
        bare = any(name.startswith("layers.") for name in names)
        canonical: Canonical = (lambda name: name if name.startswith(_HEADS) else f"model.{name}") if bare else str
        if head == "lm_head" and _class_stated(config):
            return Known(whole.tensors, whole.owned, whole.optional, canonical)
        backbone |= _classifier(config, head, where)
        hidden = backbone["model.norm.weight"]
        rows = backbone["model.embed_tokens.weight"][:1]
        return Known(backbone, ("model.", f"{head}."), {"lm_head.weight": (*rows, *hidden)}, canonical)

    return read


_HEADS = ("lm_head.", "score.")


def _class_stated(config: Mapping[str, object]) -> bool:
    return bool(config.get("architectures"))


def _classifier(config: Mapping[str, object], head: str, where: str) -> dict[str, Shape]:
    """Returns the tensors of ``score``: a bias only where every token is classified."""
    if not head.startswith("score"):
        return {}
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) and labels else dimension(config, "num_labels", 2, where)
    hidden = dimension(config, "hidden_size", 4096, where)
    bias: dict[str, Shape] = {"score.bias": (count,)} if head == "score+bias" else {}
    return {"score.weight": (count, hidden)} | bias


# ---- CLIP


def _clip_vision(config: Mapping[str, object], names: frozenset[str], where: str) -> Known:
    part = clip.unwrap(config)
    vision = clip.read_architecture(part, where)
    _dividing(vision.hidden_size, dimension(part, "num_attention_heads", 12, where), where)
    return Known(dict(clip.expected(vision)), ("vision_model.",), canonical=_inside("vision_model."))


def _clip_text(config: Mapping[str, object], names: frozenset[str], where: str) -> Known:
    part = clip_model.read_text_part(config, where) if isinstance(config.get("text_config"), dict) else dict(config)
    _dividing(dimension(part, "hidden_size", 512, where), dimension(part, "num_attention_heads", 8, where), where)
    return Known(dict(clip_model.text_tensors(part, where)), ("text_model.",), canonical=_inside("text_model."))


def _projected(
    read: Callable[[Mapping[str, object], frozenset[str], str], Known], name: str, like: str
) -> Callable[[Mapping[str, object], frozenset[str], str], Known]:
    """Returns the reader of an encoder with a projection behind it."""

    def reader(config: Mapping[str, object], names: frozenset[str], where: str) -> Known:
        known = read(config, names, where)
        width = dimension(config, "projection_dim", 512, where)
        return Known({**known.tensors, name: (width, *known.tensors[like])}, known.owned, canonical=known.canonical)

    return reader


def _clip(config: Mapping[str, object], names: frozenset[str], where: str) -> Known:
    towers = (_clip_vision(config, names, where), _clip_text(config, names, where))
    width = dimension(config, "projection_dim", 512, where)
    tensors: dict[str, Shape] = {"logit_scale": ()}
    for tower in towers:
        tensors |= tower.tensors
    tensors["visual_projection.weight"] = (width, *tensors["vision_model.post_layernorm.weight"])
    tensors["text_projection.weight"] = (width, *tensors["text_model.final_layer_norm.weight"])
    return Known(tensors, ("vision_model.", "text_model."))


def _inside(prefix: str) -> Canonical:
    """5.6 took the level out of the names of an encoder alone."""
    own = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "final_layer_norm.")
    return lambda name: prefix + name if name.startswith(own) else name


# ---- vision-language models


def _llava(config: Mapping[str, object], names: frozenset[str], where: str) -> Known | None:
    text_part = _nested(config, "text_config", {"model_type": "llama"})
    if text_part.get("model_type") not in llama.SUPPORTED:
        return None
    text = _text_part(text_part, "language_model.", where, tied=flag(config, "tie_word_embeddings", where))
    vision_part = _nested(config, "vision_config", _LLAVA_VISION)
    tensors, owned = dict(text.tensors), [*text.owned, "multi_modal_projector."]
    layer = config.get("vision_feature_layer", -2)
    width = dimension(vision_part, "hidden_size", 768, where) * (len(layer) if isinstance(layer, list) else 1)
    hidden = tensors["language_model.model.norm.weight"][0]
    bias = config.get("multimodal_projector_bias", True) is not False
    for number, columns in ((1, width), (2, hidden)):
        tensors[f"multi_modal_projector.linear_{number}.weight"] = (hidden, columns)
        if bias:
            tensors[f"multi_modal_projector.linear_{number}.bias"] = (hidden,)
    if config.get("model_type") == "llava_next":
        tensors["image_newline"] = (hidden,)
    if vision_part.get("model_type") == "clip_vision_model":
        tower = _clip_vision(vision_part, names, where)
        tensors |= {f"vision_tower.{name}": shape for name, shape in tower.tensors.items()}
        owned.append("vision_tower.")
    return Known(tensors, tuple(owned), text.optional, _legacy_llava)


# LlavaConfig and LlavaNextConfig take CLIP ViT-L/14-336 where the config says nothing of the encoder.
_LLAVA_VISION: JsonObject = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def _legacy_llava(name: str) -> str:
    """Returns the name that 4.36 to 4.51 use: see ``targets.llava.LAYOUTS``."""
    name = _legacy_parts(name)
    tower = name.removeprefix("vision_tower.")
    return f"vision_tower.{_inside('vision_model.')(tower)}" if tower != name else name


def _legacy_parts(name: str) -> str:
    """4.52 moved all parts under ``model.``, and the head out of the language model."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.")


def _internvl(config: Mapping[str, object], names: frozenset[str], where: str) -> Known | None:
    text_part = _nested(config, "text_config", {"model_type": "qwen2"})
    vision_part = _nested(config, "vision_config", {"model_type": "internvl_vision"})
    if text_part.get("model_type") not in llama.SUPPORTED or vision_part.get("model_type") != "internvl_vision":
        return None
    text = _text_part(text_part, "language_model.", where, tied=flag(config, "tie_word_embeddings", where))
    encoder = _internvit(vision_part, where)
    _dividing(encoder.hidden, dimension(vision_part, "num_attention_heads", 16, where), where)
    hidden = text.tensors["language_model.model.norm.weight"][0]
    vision = dict(internvl.vision_tensors(encoder, hidden, internvl_config.read_shuffle(config, where)[0]))
    vision = dict(_as_configured(vision, vision_part, where))
    owned = (*text.owned, "vision_tower.", "multi_modal_projector.")
    return Known({**text.tensors, **vision}, owned, text.optional, _legacy_parts)


def _as_configured(tensors: Mapping[str, Shape], part: Mapping[str, object], where: str) -> Iterator[tuple[str, Shape]]:
    """Yields the tensors of projector and encoder with what InternVL's own checkpoints never vary."""
    channels, hidden = dimension(part, "num_channels", 3, where), tensors["vision_tower.embeddings.cls_token"][-1]
    for name, shape in tensors.items():
        if name == "vision_tower.embeddings.patch_embeddings.projection.weight":
            yield name, (shape[0], channels, *shape[2:])
        elif name != _POSITIONS or flag(part, "use_absolute_position_embeddings", where):
            yield name, shape
    if flag(part, "use_mask_token", where):
        yield "vision_tower.embeddings.mask_token", (1, 1, hidden)
    if part.get("use_mean_pooling", True) is False:
        yield from clip.norm("vision_tower.layernorm", hidden)


_POSITIONS = "vision_tower.embeddings.position_embeddings"


def _internvit(part: Mapping[str, object], where: str) -> internvl_config.Encoder:
    """Returns the encoder that an ``internvl_vision`` config describes; defaults follow ``InternVLVisionConfig``."""
    return internvl_config.Encoder(
        hidden=dimension(part, "hidden_size", 1024, where),
        inner=dimension(part, "intermediate_size", 4096, where),
        layers=layers(part, 24, where),
        patch=_square(part, "patch_size", 14, where),
        image=_square(part, "image_size", 448, where),
        qkv_bias=flag(part, "attention_bias", where),
        rms=part.get("norm_type") == "rms_norm",
        qk_norm=flag(part, "use_qk_norm", where),
    )


def _square(part: Mapping[str, object], key: str, default: int, where: str) -> int:
    """Returns the side of a square that is stated as a number or as height and width."""
    value = part.get(key, default)
    sides = value if isinstance(value, list) else [value]
    if len(sides) > 2 or any(side != sides[0] for side in sides):
        raise TargetError("odd-config", f"`{key}` in config.json is not square", where=where, found=shown(value))
    return dimension({key: sides[0]} if sides else {}, key, default, where)


def _official_llava(text_type: str) -> Callable[[Mapping[str, object], frozenset[str], str], Known]:
    """Returns the reader of the LLaVA repository's own class, whose encoder is another directory's, mostly."""

    def read(config: Mapping[str, object], names: frozenset[str], where: str) -> Known:
        plain = {key: value for key, value in config.items() if key != "architectures"}  # the class is LLaVA's own
        text = _text_part({**plain, "model_type": text_type}, "", where)
        hidden = text.tensors["model.norm.weight"][0]
        projector = dict(_official_projector(config, hidden, where))
        owned = ("model.layers.", "model.mm_projector." if projector else "model.norm.", "lm_head.")
        return Known({**text.tensors, **projector}, owned, text.optional)

    return read


def _official_projector(config: Mapping[str, object], hidden: int, where: str) -> dict[str, Shape]:
    """Returns the tensors of ``mlpNx_gelu``: N linear layers, an activation between two."""
    kind, width = config.get("mm_projector_type"), config.get("mm_hidden_size")
    if not isinstance(kind, str) or not kind.startswith("mlp") or not kind.endswith("x_gelu") or width is None:
        return {}
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if not depth.isdecimal() or len(depth) > 1:
        return {}
    tensors: dict[str, Shape] = {}
    for index in range(int(depth)):
        columns = hidden if index else dimension(config, "mm_hidden_size", hidden, where)
        tensors[f"model.mm_projector.{2 * index}.weight"] = (hidden, columns)
        tensors[f"model.mm_projector.{2 * index}.bias"] = (hidden,)
    return tensors


def _nested(config: Mapping[str, object], key: str, default: JsonObject) -> JsonObject:
    value = config.get(key)
    if not isinstance(value, dict) or not value:
        return default
    return value if "model_type" in value else {"model_type": shown_type(default), **value}


def shown_type(config: Mapping[str, object]) -> str:
    """Returns the model type of a part as text."""
    value = config.get("model_type")
    return value if isinstance(value, str) else shown(value)


_TEXT_FAMILIES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2"}
_CLASSES: dict[str, _WeightsReader] = {
    "CLIPModel": _clip,
    "CLIPVisionModel": _clip_vision,
    "CLIPVisionModelWithProjection": _projected(
        _clip_vision, "visual_projection.weight", "vision_model.post_layernorm.weight"
    ),
    "CLIPTextModel": _clip_text,
    "CLIPTextModelWithProjection": _projected(
        _clip_text, "text_projection.weight", "text_model.final_layer_norm.weight"
    ),
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava,
    "InternVLForConditionalGeneration": _internvl,
    "LlavaLlamaForCausalLM": _official_llava("llama"),
    "LlavaMistralForCausalLM": _official_llava("mistral"),
    "LlavaQwenForCausalLM": _official_llava("qwen2"),
}
for _family, _type in _TEXT_FAMILIES.items():
    _CLASSES[f"{_family}ForCausalLM"] = _language_model(_type, "lm_head")
    _CLASSES[f"{_family}Model"] = _language_model(_type, "none")
    _CLASSES[f"{_family}ForSequenceClassification"] = _language_model(_type, "score")
    _CLASSES[f"{_family}ForTokenClassification"] = _language_model(_type, "score+bias")

KNOWN_CLASSES = tuple(_CLASSES)
# What loads a config without `architectures`. A causal model's head may then be missing: it may be the base model.
_DEFAULT_CLASSES = {
    **{model_type: f"{family}ForCausalLM" for family, model_type in _TEXT_FAMILIES.items()},
    "clip_vision_model": "CLIPVisionModel",
    "clip_text_model": "CLIPTextModel",
}
