"""The text of a template, read: literals, captures and formulas, and what is wrong with them.

Only one capture of a segment may be of open length. So no text can be divided in a growing number of ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from shardmerge.errors import MappingError
from shardmerge.formulas import Formula
from shardmerge.mapping.yaml_nodes import Mark

CaptureKind: TypeAlias = Literal["text", "int", "choice", "rest", "each", "digits"]

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<body>[^{}]*)\}|[^{}]+|[{}]")
_BODY = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<rest>\.\.\.)?(?P<each>\*)?(?::(?P<kind>.*))?", re.ASCII | re.DOTALL)
_DIGITS = re.compile("[0-9]{1,9}")
_SHIFT = re.compile(r"\s*(?P<name>[A-Za-z_]\w*)\s*(?P<sign>[+-])\s*(?P<by>[0-9]{1,9})\s*", re.ASCII)

_SYNTAX = (
    "captures are {x}, {i:int}, {r:02}, {x:a|b}, {rest...}, {e*} and {i + 1}; "
    "write {{ and }} for braces of the name itself"
)


@dataclass(frozen=True, slots=True)
class Capture:
    """A part of a template that takes text from the name.

    Attributes
    ----------
    name
        What the text is bound to.
    kind
        ``text`` (one segment, or a part of it), ``int`` (1 to 9 digits), ``choice``, ``rest`` (one segment or
        more), ``each`` (one segment, all its values collected), ``digits`` (a number of fixed width, zeros in front).
    choices
        What a ``choice`` may be, in the order written.
    shift
        What the number in the name is larger than the number bound; ``int`` only.
    width
        Of ``digits``.
    """

    name: str
    kind: CaptureKind
    choices: tuple[str, ...] = ()
    shift: int = 0
    width: int = 0

    def accepts(self, value: str) -> bool:
        """Tells whether the capture could have taken this text."""
        match self.kind:
            case "int" | "digits":
                return _DIGITS.fullmatch(value) is not None
            case "choice":
                return value in self.choices
            case "rest":
                return "" not in value.split(".")
            case "text" | "each":
                return value != "" and "." not in value

    def bound(self, text: str) -> str | None:
        """Returns what the text of a name binds; None where a shifted number would be negative."""
        if not self.shift:
            return text
        number = int(text) - self.shift
        return str(number) if number >= 0 else None

    def written(self, value: str) -> str:
        """Returns the text of a name for a bound value."""
        if self.kind == "digits":
            return value.zfill(self.width)
        return str(int(value) + self.shift) if self.shift else value


TemplatePart: TypeAlias = str | Capture | Formula
Placed: TypeAlias = tuple[int, TemplatePart]


@dataclass(frozen=True, slots=True)
class TemplateText:
    """The text of a template, and where its first character stands."""

    text: str
    mark: Mark | None

    def error(self, code: str, what: str, offset: int, hint: str = _SYNTAX) -> MappingError:
        """Returns an error ``offset`` characters into the text."""
        where = f"column {offset + 1}" if self.mark is None else str(self.mark.right(offset))
        return MappingError(code, what, where=where, found=self.text[:200], hint=hint)


def read_parts(source: TemplateText) -> Iterator[Placed]:
    """Yields the parts with their offsets; neighbouring literals are joined."""
    start, literal = 0, ""
    for token in _TOKEN.finditer(source.text):
        if token["body"] is None:
            start = start if literal else token.start()
            literal += _literal(token, source)
            continue
        if literal:
            yield start, literal
            literal = ""
        yield token.start(), _capture(token["body"], token.start(), source)
    if literal:
        yield start, literal


def _literal(token: re.Match[str], source: TemplateText) -> str:
    text = token[0]
    if text in {"{", "}"}:
        raise source.error("unpaired-brace", f"a `{text}` without its counterpart", token.start())
    return text[0] if text in {"{{", "}}"} else text


def _capture(body: str, offset: int, source: TemplateText) -> Capture | Formula:
    shift = _SHIFT.fullmatch(body)
    if shift is not None:
        by = int(shift["by"])
        return Capture(shift["name"], "int", shift=by if shift["sign"] == "+" else -by)
    match = _BODY.fullmatch(body)
    if match is None and any(sign in body for sign in "+-*/%"):
        where = str(source.mark.right(offset)) if source.mark else f"column {offset + 1}"
        return Formula.parse(body, where)
    if match is None or [match["rest"], match["each"], match["kind"]].count(None) < 2:
        raise source.error("bad-capture", f"`{{{body}}}` is not a capture", offset)
    name, kind = match["name"], match["kind"]
    if match["rest"] or match["each"]:
        return Capture(name, "rest" if match["rest"] else "each")
    if kind is None or kind == "int":
        return Capture(name, "text" if kind is None else "int")
    if re.fullmatch("0[1-9]", kind):
        return Capture(name, "digits", width=int(kind))
    choices = tuple(dict.fromkeys(kind.split("|")))
    if "|" not in kind or any(not choice or "." in choice for choice in choices):
        what = f"`{kind}` is neither `int` nor a list of dot-free words such as `a|b`"
        raise source.error("bad-capture", what, offset)
    return Capture(name, "choice", choices)


def cut_at_dots(placed: tuple[Placed, ...]) -> list[list[Placed]]:
    """Returns the parts of each dot-free piece, with their offsets."""
    segments: list[list[Placed]] = [[]]
    for offset, part in placed:
        if not isinstance(part, str):
            segments[-1].append((offset, part))
            continue
        for index, text in enumerate(part.split(".")):
            if index:
                segments.append([])
            if text:
                segments[-1].append((offset, text))
    return segments


def check_segments(segments: list[list[Placed]], source: TemplateText) -> None:
    """Refuses templates that a name could fit in several ways; raises as ``Template.parse``."""
    for segment in segments:
        _check_segment(segment, source)
    rests = [offset for segment in segments for offset, part in segment if _is_rest(part)]
    if len(rests) > 1:
        raise source.error("two-rests", "a template can have one `...` capture", rests[1])


def _check_segment(segment: list[Placed], source: TemplateText) -> None:
    for (_, left), (offset, right) in pairwise(segment):
        if not isinstance(left, str) and not isinstance(right, str):
            raise source.error("adjacent-captures", "two captures need text between them", offset)
    rest = next((offset for offset, part in segment if _is_rest(part)), None)
    if rest is not None and len(segment) > 1:
        what = "a `...` capture takes whole segments: put a dot on each side"
        raise source.error("rest-not-whole", what, rest)
    followers = [*(part for _, part in segment[1:]), None]
    pairs = zip(segment, followers, strict=False)  # an empty segment (`a..b`) has no part to follow
    opened = [offset for (offset, part), after in pairs if _is_open(part, after)]
    if len(opened) > 1:
        what = "two captures of open length in one segment: a name could be divided in several ways"
        raise source.error("ambiguous-segment", what, opened[1], "use {i:int} or {x:a|b} for one of the two")


def _is_rest(part: TemplatePart) -> bool:
    return isinstance(part, Capture) and part.kind == "rest"


def _is_open(part: TemplatePart, after: TemplatePart | None) -> bool:
    """Tells whether the text behind a capture leaves a choice of where the capture ends."""
    if isinstance(part, str):
        return False
    if isinstance(part, Capture) and part.kind == "digits":
        return False
    if isinstance(part, Formula) or part.kind == "int":
        return isinstance(after, str) and after[0] in "0123456789"
    if part.kind == "choice":
        starts = ((a, b) for a in part.choices for b in part.choices if a != b)
        return after is not None and any(b.startswith(a) for a, b in starts)
    return True
