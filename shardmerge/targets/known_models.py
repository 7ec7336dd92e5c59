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
from shardmerge.targets import internvl, internvl_config
from shardmerge.targets.architecture_reader import nested, read_architecture
from shardmerge.targets.config_numbers import JsonObject, dimension, flag, layers
from shardmerge.targets.tables import ArchitectureTable, every_table, find_table
from shardmerge.targets.text_config import PARTS
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
    if "quantization_config" in config:  # other shapes
        return None
    stated = config.get("architectures")
    make = _CLASSES.get(stated[0]) if isinstance(stated, list) and stated and isinstance(stated[0], str) else None
    if make is None:
        return _tabled(config, names, where)
    return None if "auto_map" in config else make(config, frozenset(names), where)


# ---- models with a table

# Experts as a model of transformers 5 has them in memory, and as its training saves them.
_STACKED = ".experts.gate_up_proj"


def _tabled(config: Mapping[str, object], names: Iterable[str], where: str) -> Known | None:
    """Returns what a table says of the class that is stated, or of the one that loads the config where none is."""
    table, stated = find_table(config.get("model_type")), config.get("architectures")
    if table is None:
        return None
    kind = stated[0] if isinstance(stated, list) and stated else table.main_class
    for key in table.parts if kind not in table.classes else ():  # an encoder's class, and the config of the pair
        part = nested(config, key, table.parts[key]) or {}
        found = _tabled({**part, "architectures": [kind]}, names, where)
        if found:
            return found
    if kind not in table.classes or ("auto_map" in config and not table.own_code):
        return None
    model = read_architecture(config, where).changed(stacked=any(name.endswith(_STACKED) for name in names))
    every, heads = model.every(kind), {name for name, _ in table.tied}
    spare = heads if model.tied or not stated else set()
    optional = {name: shape for name, shape in model.every(table.main_class).items() if name in heads}
    tensors = {name: shape for name, shape in every.items() if name not in spare}
    owned = dict.fromkeys(name.partition(".")[0] + "." for name in every)
    return Known(tensors, tuple(owned), {} if heads & set(tensors) else optional, _inside(table))


def _inside(table: ArchitectureTable) -> Canonical:
    """The files of a base model, and those of an encoder alone from 5.6 on, have its names without the prefix."""
    own = tuple(f"{name.split('.')[0]}." for root in table.tensors for name in (node.name for node in root.inside))
    return lambda name: table.prefix + name if table.prefix and name.startswith(own) else name


# ---- vision-language models


def _text_part(config: Mapping[str, object], prefix: str, where: str, *, tied: bool = False) -> Known:
    """Returns a causal language model whose names begin with ``prefix``."""
    text = read_architecture(config, where)
    every = text.every(text.table.main_class)
    spare = {name for name, _ in text.table.tied} if tied or text.tied else set()
    return Known(
        {prefix + name: shape for name, shape in every.items() if name not in spare},
        (f"{prefix}model.", f"{prefix}lm_head."),
        {prefix + name: every[name] for name in spare},
    )


def _llava(config: Mapping[str, object], names: frozenset[str], where: str) -> Known | None:
    text_part = _nested(config, "text_config", {"model_type": "llama"})
    if text_part.get("model_type") not in PARTS:
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
        tower = read_architecture(vision_part, where)
        tensors |= {f"vision_tower.{name}": shape for name, shape in tower.tensors().items()}
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
    clip = find_table("clip_vision_model")
    return f"vision_tower.{_inside(clip)(tower)}" if clip and tower != name else name


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
    if text_part.get("model_type") not in PARTS or vision_part.get("model_type") != "internvl_vision":
        return None
    text = _text_part(text_part, "language_model.", where, tied=flag(config, "tie_word_embeddings", where))
    encoder = _internvit(vision_part, where)
    heads = dimension(vision_part, "num_attention_heads", 16, where)
    if encoder.hidden % heads:
        raise TargetError(
            "odd-config",
            "`hidden_size` in config.json is not a multiple of `num_attention_heads`",
            where=where,
            found=f"{encoder.hidden} and {heads}",
            hint=f"correct the one that does not describe these weights in {where}",
        )
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
        yield "vision_tower.layernorm.weight", (hidden,)
        yield "vision_tower.layernorm.bias", (hidden,)


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


_CLASSES: dict[str, _WeightsReader] = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava,
    "InternVLForConditionalGeneration": _internvl,
    "LlavaLlamaForCausalLM": _official_llava("llama"),
    "LlavaMistralForCausalLM": _official_llava("mistral"),
    "LlavaQwenForCausalLM": _official_llava("qwen2"),
}

CODED_CLASSES = tuple(_CLASSES)


def known_classes() -> tuple[str, ...]:
    """Returns the names of all classes that are known."""
    return (*_CLASSES, *(kind for table in every_table() for kind in table.classes))
