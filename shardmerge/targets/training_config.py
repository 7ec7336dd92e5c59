"""What a training config says about a checkpoint, read from its syntax tree and never executed.

mmengine stores the whole config as Python text in ``meta["cfg"]``: one assignment per name, sorted, of
literals, lists and ``dict(...)`` calls. Configs written by hand also bind names first and use them later. Anything
else is unknown, and an unknown fact only makes a message less precise.
"""

from __future__ import annotations

import ast
import enum
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.config_numbers import is_finite, is_whole

MAX_CHARS = 4 << 20

# A syntax tree costs up to 600 bytes a character, so that only the statements that matter are parsed, one by
# one. The model section of a real config has 1 to 4 KB.
_MAX_STATEMENT = 32 << 10
_LONGEST_INDEX = 6
_MAX_NAMES = 16  # how long a chain of names bound to names is followed

# A statement begins where a line begins with something that neither continues nor comments the one before.
_STATEMENT = re.compile(r"^(?=[^\s#)\]}])", re.MULTILINE)
_CHANGED_LATER = re.compile(r"^([A-Za-z_]\w*)[ \t]*[.\[]", re.MULTILINE)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)[ \t]*=(?!=)")


class _Unknown(enum.Enum):
    UNKNOWN = enum.auto()


_UNKNOWN = _Unknown.UNKNOWN
ConfigValue: TypeAlias = (
    "str | int | float | tuple[ConfigValue, ...] | Mapping[str, ConfigValue] | Literal[_Unknown.UNKNOWN] | None"
)


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What is known of a training run; ``None`` or ``""`` is not known.

    Attributes
    ----------
    freeze_llm, freeze_visual_encoder
        Parts that were not trained, and so are not in the checkpoint.
    llm_path, vision_path
        What the parts started from: a hub id, or a path on the machine of the training.
    visual_select_layer
        The encoder layer whose output feeds the projector.
    projector_depth
        Linear layers of the projector.
    llm_lora, visual_encoder_lora
        The part was trained as an adapter, which wins over its freeze flag; ``None`` where it was not. An adapter whose
        config cannot be read is one of which nothing is known.
    """

    freeze_llm: bool | None = None
    freeze_visual_encoder: bool | None = None
    llm_path: str = ""
    vision_path: str = ""
    visual_select_layer: int | None = None
    projector_depth: int | None = None
    llm_lora: AdapterConfig | None = None
    visual_encoder_lora: AdapterConfig | None = None


def read_training_config(text: str) -> TrainingFacts:
    """Returns what a training config says. Never raises, and never runs the text.

    Keys are those of ``xtuner.model.LLaVAModel``, and ``lora`` of ``SupervisedFinetune``.
    """
    model = lookup(text, "model")
    if not isinstance(model, Mapping):
        return TrainingFacts()
    llm, vision = part_of(model, "llm"), part_of(model, "visual_encoder")
    return TrainingFacts(
        freeze_llm=_flag(model, "freeze_llm"),
        freeze_visual_encoder=_flag(model, "freeze_visual_encoder"),
        llm_path=plain_text(llm, "pretrained_model_name_or_path"),
        vision_path=plain_text(vision, "pretrained_model_name_or_path"),
        visual_select_layer=config_integer(model, "visual_select_layer"),
        projector_depth=config_integer(model, "projector_depth"),
        llm_lora=_lora(model, "llm_lora") or _lora(model, "lora"),
        visual_encoder_lora=_lora(model, "visual_encoder_lora"),
    )


def read_config_value(text: str, dotted: str) -> str | int | float | bool | None:
    """Returns a plain value of a training config by its dotted name. Never raises, and never runs the text.

    Parameters
    ----------
    text
        The config, as Python.
    dotted
        A top-level name, then keys, or numbers for the items of a list: ``model.llm_lora.r``, ``betas.0``.

    Returns
    -------
    str | int | float | bool | None
        ``None`` where there is no such value, where it is no literal, and where it is ``None``.
    """
    name, *keys = dotted.split(".")
    value = lookup(text, name) if name.isidentifier() else _UNKNOWN
    for key in keys:
        value = _item(value, key)
    return value if isinstance(value, str | int | float) else None


def lookup(text: str, name: str) -> ConfigValue:
    """Returns what a top-level name is bound to; unknown where it is changed in place later."""
    if len(text) > MAX_CHARS:
        return _UNKNOWN
    changed = frozenset(match[1] for match in _CHANGED_LATER.finditer(text))
    try:
        return _Config(_statements(text), changed).value(name)
    except RecursionError:
        return _UNKNOWN


def _item(value: ConfigValue, key: str) -> ConfigValue:
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, tuple) and key.isascii() and key.isdigit() and len(key) < _LONGEST_INDEX:
        return value[int(key)] if int(key) < len(value) else None
    return None


def _lora(model: Mapping[str, ConfigValue], key: str) -> AdapterConfig | None:
    """Returns what is known of an adapter; the config may be anything that is not ``None``.

    Alpha is ``None`` too where something else that changes the scale is there and cannot be read.
    """
    if model.get(key) is None:
        return None
    section = part_of(model, key)
    ranks, alphas = _numbers(section, "rank_pattern"), _numbers(section, "alpha_pattern")
    rslora = _flag(section, "use_rslora") if "use_rslora" in section else False
    alpha = _number(section, "lora_alpha") if rslora is not None else None
    return AdapterConfig(
        alpha=alpha if ranks is not None and alphas is not None else None,
        rank=config_integer(section, "r"),
        rslora=rslora is True,
        fan_in_fan_out=_flag(section, "fan_in_fan_out") or False,
        rank_pattern={name: rank for name, rank in (ranks or {}).items() if isinstance(rank, int)},
        alpha_pattern=alphas or {},
    )


def _numbers(section: Mapping[str, ConfigValue], key: str) -> dict[str, float] | None:
    """Returns a mapping of numbers, empty where it is not given; ``None`` where it cannot be read."""
    value = section.get(key)
    if value is None:
        return {}
    found = value if isinstance(value, Mapping) else {"": _UNKNOWN}
    numbers = {name: number for name in found if (number := _number(found, name)) is not None}
    return numbers if len(numbers) == len(found) else None


def part_of(model: Mapping[str, ConfigValue], key: str) -> Mapping[str, ConfigValue]:
    """Returns a part of a config, empty where it is none."""
    value = model.get(key)
    return value if isinstance(value, Mapping) else {}


def _flag(section: Mapping[str, ConfigValue], key: str) -> bool | None:
    value = section.get(key)
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


def config_integer(part: Mapping[str, ConfigValue], key: str) -> int | None:
    """Returns a number of a config, ``None`` where there is none."""
    value = part.get(key)
    return value if is_whole(value) else None


def _number(section: Mapping[str, ConfigValue], key: str) -> float | None:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if is_finite(value) else None


def plain_text(part: Mapping[str, ConfigValue], key: str) -> str:
    """Returns a text of a config, ``""`` where there is none."""
    value = part.get(key)
    return value if isinstance(value, str) else ""


def _statements(text: str) -> list[tuple[str, str]]:
    """Returns the top-level assignments in order: the name, and the text of the whole statement."""
    starts = [match.start() for match in _STATEMENT.finditer(text)]
    found = []
    for start, stop in pairwise([*starts, len(text)]):
        if (match := _ASSIGNMENT.match(text, start)) is not None:
            found.append((match[1], text[start:stop]))
    return found


@dataclass(slots=True)
class _Config:
    """Looks values up by name; a name that is ``changed`` in place is unknown.

    A statement is evaluated once, so that names used twice cost nothing.
    """

    statements: list[tuple[str, str]]
    changed: frozenset[str]
    known: dict[int, ConfigValue] = field(default_factory=dict)

    def value(self, name: str) -> ConfigValue:
        """Returns what a name is bound to at the end of the text."""
        return self._bound(name, len(self.statements), 0)

    def _bound(self, name: str, before: int, depth: int) -> ConfigValue:
        """Returns what a name is bound to before the statement ``before``."""
        index = next((i for i in range(before - 1, -1, -1) if self.statements[i][0] == name), None)
        if index is None or depth > _MAX_NAMES or name in self.changed:
            return _UNKNOWN
        if index not in self.known:
            node = _parse(self.statements[index][1])
            self.known[index] = self._evaluate(node, index, depth) if node is not None else _UNKNOWN
        return self.known[index]

    def _evaluate(self, node: ast.expr, index: int, depth: int) -> ConfigValue:
        match node:
            case ast.Constant(value=str() | int() | float() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Name(id=name):
                return self._bound(name, index, depth + 1)
            case _:
                return self._container(node, index, depth)

    def _container(self, node: ast.expr, index: int, depth: int) -> ConfigValue:
        match node:
            case ast.Dict(keys=keys, values=values):
                names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
                return self._mapping(names, values, index, depth)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return self._sequence(items, index, depth)
            case ast.Call(func=ast.Name(id="dict"), args=[ast.Dict() as only], keywords=[]):
                return self._container(only, index, depth)  # how mmengine writes keys that are no identifiers
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                return self._mapping([word.arg for word in keywords], [word.value for word in keywords], index, depth)
            case _:
                return _UNKNOWN

    def _sequence(self, items: Sequence[ast.expr], index: int, depth: int) -> ConfigValue:
        """Returns the items of a list or tuple. A starred one may stand for any number of items."""
        if any(isinstance(item, ast.Starred) for item in items):
            return _UNKNOWN
        return tuple(self._evaluate(item, index, depth) for item in items)

    def _mapping(self, names: Sequence[object], values: list[ast.expr], index: int, depth: int) -> ConfigValue:
        """Returns the items of a display or call. A name that is no string (``**``) may hide anything."""
        if not all(isinstance(name, str) for name in names):
            return _UNKNOWN
        return {str(name): self._evaluate(value, index, depth) for name, value in zip(names, values, strict=True)}


def _parse(text: str) -> ast.expr | None:
    """Returns the expression that a statement assigns, or ``None`` for anything that does not parse."""
    if len(text) > _MAX_STATEMENT:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a prompt template is no news to anyone here
            body = ast.parse(text).body
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # the last two: nesting deeper than the parser's
        return None
    only = body[0] if len(body) == 1 else None
    return only.value if isinstance(only, ast.Assign) and len(only.targets) == 1 else None
