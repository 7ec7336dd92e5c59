"""The models whose every tensor is known here, from a published config.json: names, shapes, and what else may be there.

One entry a class of transformers. Names are compared in the form that the hub's files have; what versions of
transformers call the same tensor otherwise (facts of 4.36 to 5.24) is brought to that form first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from shardmerge.errors import TargetError
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import nested, read_architecture
from shardmerge.targets.config_numbers import dimension
from shardmerge.targets.llava import official_config
from shardmerge.targets.tables import ArchitectureTable, find_table
from shardmerge.tensors import Shape

Canonical: TypeAlias = Callable[[str], str]

# LLaVA's own classes, and the language model in each.
_OFFICIAL = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}

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
    unread
        Prefixes inside of those, of what may be there and is not loaded.
    """

    tensors: Mapping[str, Shape]
    owned: tuple[str, ...]
    optional: Mapping[str, Shape] = field(default_factory=dict)
    canonical: Canonical = str
    unread: tuple[str, ...] = ()

    def is_own(self, name: str) -> bool:
        """Whether a canonical name that the model does not have contradicts the config."""
        return name.startswith(self.owned) and not name.endswith(_BUFFERS) and not name.startswith(self.unread)

    def is_foreign(self, name: str) -> bool:
        """Whether a canonical name is of something else than the model."""
        return not name.endswith(_BUFFERS) and not self.is_own(name)


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
    kind = stated[0] if isinstance(stated, list) and stated else None
    text = _OFFICIAL.get(kind) if isinstance(kind, str) else None
    if text is None:
        return _tabled(config, names, where)
    return None if "auto_map" in config else _official_llava(config, text, where)


# ---- models with a table


def _tabled(config: Mapping[str, object], names: Iterable[str], where: str) -> Known | None:
    """Returns what a table says of the class that is stated, or of the one that loads the config where none is."""
    table, stated = find_table(config.get("model_type")), config.get("architectures")
    if table is None:
        return None
    kind = stated[0] if isinstance(stated, list) and stated else table.main_class
    for key, part in table.parts.items() if kind not in table.classes else ():  # an encoder's class
        inside = {**part.usual, **(nested(config, key) or {}), "architectures": [kind]}
        if kind in getattr(find_table(inside["model_type"]), "classes", ()):
            return _tabled(inside, names, where)
    if kind not in table.classes or ("auto_map" in config and not table.own_code):
        return None
    try:
        model = read_architecture(config, where)
    except TargetError as error:
        if table.parts and error.code == "unsupported-architecture":
            return None
        raise
    there = frozenset(names)
    known = _known(_as_named(model, there), kind, headless=not stated)
    return replace(known, unread=model.unread(there))


def _as_named(model: Architecture, names: frozenset[str]) -> Architecture:
    """Returns a model, and those inside of it, with the names that they have in memory where some are there."""
    parts = {key: _as_named(part, names) for key, part in model.parts.items()}
    in_memory = any(name.endswith(model.table.in_memory) for name in names)
    return replace(model.changed(in_memory=in_memory), parts=parts)


def _known(model: Architecture, kind: str, *, headless: bool = False) -> Known:
    """Returns what the weights of a class must be; ``headless`` where they may be a base model's."""
    every, heads = model.every(kind), model.all_ties
    spare = heads if headless else model.ties
    tensors = {name: shape for name, shape in every.items() if name not in spare}
    others = model.every(model.table.main_class)
    optional = {name: others[name] for name in heads if name in others and name not in tensors}
    owned = dict.fromkeys(name.partition(".")[0] + "." for name in every)
    return Known(tensors, tuple(owned), optional, _canonical(model))


def _canonical(model: Architecture) -> Canonical:
    """Returns what brings a name to the form of the table."""
    encoders = [(model.table.parts[key].prefix, part.table) for key, part in model.parts.items()]
    # A DINOv2 that stands alone has no prefix to begin with.
    with_prefix = (one for one in encoders if one[0] and one[1].main_class not in one[1].bare)
    encoders = [(prefix, table) for prefix, table in with_prefix if table.kind != "text"]

    def canonical(name: str) -> str:
        old, new = next((pair for pair in model.table.renames if name.startswith(pair[0])), ("", ""))
        name = _inside(model.table, new + name.removeprefix(old))
        for prefix, table in encoders:
            if name.startswith(prefix):
                name = prefix + _inside(table, name.removeprefix(prefix))
        return name

    return canonical


def _inside(table: ArchitectureTable, name: str) -> str:
    """The files of a base model, and those of an encoder alone from 5.6 on, have its names without the prefix."""
    own = [node.name.partition(".")[0] for root in table.tensors for node in root.inside]
    return table.prefix + name if table.prefix and name.partition(".")[0] in own else name


# ---- LLaVA's own code


def _official_llava(config: Mapping[str, object], text_type: str, where: str) -> Known:
    """Returns what the LLaVA repository's own class has; its encoder is another directory's, mostly."""
    plain = {key: value for key, value in config.items() if key != "architectures"}  # the class is LLaVA's own
    model = read_architecture({**plain, "model_type": text_type}, where)
    text = _known(model, model.table.main_class)
    projector = _official_projector(config, model.hidden_size, where)
    owned = ("model.layers.", "model.mm_projector." if projector else "model.norm.", "lm_head.")
    return Known({**text.tensors, **projector}, owned, text.optional)


def _official_projector(config: Mapping[str, object], hidden: int, where: str) -> dict[str, Shape]:
    """Returns the tensors of ``mlpNx_gelu``; none where the config does not say N or the width of the encoder."""
    kind, depth = config.get("mm_projector_type", "linear"), official_config.projector_depth(config)
    if kind == "linear" or depth is None or config.get("mm_hidden_size") is None:
        return {}
    columns = dimension(config, "mm_hidden_size", hidden, where)
    return official_config.projector_tensors("model.mm_projector.", depth, columns, hidden)
