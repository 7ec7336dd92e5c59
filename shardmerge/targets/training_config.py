"""What a training config says about a checkpoint, read from its syntax tree and never executed.

mmengine stores the whole config as Python text in ``meta["cfg"]``: one assignment per name, sorted, of
literals and ``dict(...)`` calls. Configs written by hand also bind names first and use them later. Anything
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

MAX_CHARS = 4 << 20

# A syntax tree costs up to 600 bytes a character, so that only the statements that matter are parsed, one by
# one. The model section of a real config has 1 to 4 KB.
_MAX_STATEMENT = 32 << 10
_MAX_NAMES = 16  # how long a chain of names bound to names is followed

# A statement begins where a line begins with something that neither continues nor comments the one before.
_STATEMENT = re.compile(r"^(?=[^\s#)\]}])", re.MULTILINE)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)[ \t]*=(?!=)")
_CHANGED_LATER = re.compile(r"^model[ \t]*[.\[]", re.MULTILINE)


class _Unknown(enum.Enum):
    UNKNOWN = enum.auto()


_UNKNOWN = _Unknown.UNKNOWN
_Value: TypeAlias = "str | int | float | Mapping[str, _Value] | Literal[_Unknown.UNKNOWN] | None"


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
        The part was trained as an adapter, which wins over its freeze flag.
    quantized
        The language model was loaded in 4 or 8 bits.
    """

    freeze_llm: bool | None = None
    freeze_visual_encoder: bool | None = None
    llm_path: str = ""
    vision_path: str = ""
    visual_select_layer: int | None = None
    projector_depth: int | None = None
    llm_lora: bool = False
    visual_encoder_lora: bool = False
    quantized: bool = False


def read_training_config(text: str) -> TrainingFacts:
    """Returns what a training config says. Never raises, and never runs the text.

    Keys are those of ``xtuner.model.LLaVAModel``.
    """
    if len(text) > MAX_CHARS or _CHANGED_LATER.search(text):
        return TrainingFacts()
    try:
        model = _Config(_statements(text)).value("model")
    except RecursionError:
        return TrainingFacts()
    if not isinstance(model, Mapping):
        return TrainingFacts()
    llm, vision = _section(model, "llm"), _section(model, "visual_encoder")
    return TrainingFacts(
        freeze_llm=_flag(model, "freeze_llm"),
        freeze_visual_encoder=_flag(model, "freeze_visual_encoder"),
        llm_path=_text(llm, "pretrained_model_name_or_path"),
        vision_path=_text(vision, "pretrained_model_name_or_path"),
        visual_select_layer=_integer(model, "visual_select_layer"),
        projector_depth=_integer(model, "projector_depth"),
        llm_lora=model.get("llm_lora") is not None,
        visual_encoder_lora=model.get("visual_encoder_lora") is not None,
        quantized=llm.get("quantization_config") is not None,
    )


def _section(model: Mapping[str, _Value], key: str) -> Mapping[str, _Value]:
    value = model.get(key)
    return value if isinstance(value, Mapping) else {}


def _flag(section: Mapping[str, _Value], key: str) -> bool | None:
    value = section.get(key)
    return value if isinstance(value, bool) else None


def _integer(section: Mapping[str, _Value], key: str) -> int | None:
    value = section.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(section: Mapping[str, _Value], key: str) -> str:
    value = section.get(key)
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
    """Looks values up by name. A statement is evaluated once, so that names used twice cost nothing."""

    statements: list[tuple[str, str]]
    known: dict[int, _Value] = field(default_factory=dict)

    def value(self, name: str) -> _Value:
        """Returns what a name is bound to at the end of the text."""
        return self._bound(name, len(self.statements), 0)

    def _bound(self, name: str, before: int, depth: int) -> _Value:
        """Returns what a name is bound to before the statement ``before``."""
        index = next((i for i in range(before - 1, -1, -1) if self.statements[i][0] == name), None)
        if index is None or depth > _MAX_NAMES:
            return _UNKNOWN
        if index not in self.known:
            node = _parse(self.statements[index][1])
            self.known[index] = self._evaluate(node, index, depth) if node is not None else _UNKNOWN
        return self.known[index]

    def _evaluate(self, node: ast.expr, index: int, depth: int) -> _Value:
        match node:
            case ast.Constant(value=str() | int() | float() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Name(id=name):
                return self._bound(name, index, depth + 1)
            case ast.Dict(keys=keys, values=values):
                names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
                return self._mapping(names, values, index, depth)
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                return self._mapping([word.arg for word in keywords], [word.value for word in keywords], index, depth)
            case _:
                return _UNKNOWN

    def _mapping(self, names: Sequence[object], values: list[ast.expr], index: int, depth: int) -> _Value:
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
