"""Name templates: ``model.layers.{i:int}.{rest...}``.

A template matches whole names, or does not. It is cut at its dots: every segment of it stands for exactly one
segment of the name, except ``{rest...}``, which takes what lies between the segments before and behind it.
Only one capture of a segment may be of open length. So no text can be divided in a growing number of ways,
and a match takes time linear in the name, whatever the name.

Numbers can be computed: ``{i + 16}`` matches a number and binds ``i`` to 16 less, and is written as 16 more. A formula
of several names (``{i + stage * per_stage}``) can only be written, in a target.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

from shardmerge.errors import MappingError
from shardmerge.mapping.arithmetic import Formula
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


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template.

    Attributes
    ----------
    text
        As the user wrote it.
    parts
        Literal text (braces unescaped) and captures, in order.
    captures
        The names it binds, in order, each once.
    head, tail
        The literal text that every matching name begins and ends with.
    """

    text: str
    parts: tuple[TemplatePart, ...]
    captures: tuple[str, ...]
    head: str
    tail: str
    _front: tuple[_Segment, ...] = field(repr=False, compare=False)
    _rest: str = field(repr=False, compare=False)
    _back: tuple[_Segment, ...] = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str, mark: Mark | None = None) -> Template:
        """Returns the template that ``text`` says.

        Parameters
        ----------
        text
            The template.
        mark
            Where its first character stands, for the messages.

        Raises
        ------
        MappingError
            ``empty-template``, ``unpaired-brace``, ``bad-capture``, ``adjacent-captures``, ``two-rests``,
            ``rest-not-whole``, ``ambiguous-segment``.
        """
        source = _TemplateText(text, mark)
        if not text:
            raise source.error("empty-template", "a template cannot be empty", 0)
        placed = tuple(_parts(source))
        parts = tuple(part for _, part in placed)
        segments = _segments(placed)
        _check(segments, source)
        return cls(
            text,
            parts,
            tuple(dict.fromkeys(part.name for part in parts if isinstance(part, Capture))),
            parts[0] if isinstance(parts[0], str) else "",
            parts[-1] if isinstance(parts[-1], str) else "",
            *_halves([_segment(tuple(part for _, part in segment)) for segment in segments]),
        )

    def __str__(self) -> str:
        return self.text

    @property
    def formulas(self) -> tuple[Formula, ...]:
        """Its parts that are computed of several names."""
        return tuple(part for part in self.parts if isinstance(part, Formula))

    @property
    def collected(self) -> str:
        """The name of its ``{e*}``, or ``""``."""
        return next((part.name for part in self.parts if isinstance(part, Capture) and part.kind == "each"), "")

    @property
    def collects(self) -> bool:
        """Whether it has a ``{e*}``, which stands for many names at once."""
        return bool(self.collected)

    def match(self, name: str) -> dict[str, str] | None:
        """Returns what the captures take from ``name``, or None if it does not match."""
        if not (name.startswith(self.head) and name.endswith(self.tail)):
            return None
        texts = name.split(".")
        middle = len(texts) - len(self._front) - len(self._back)
        if middle < 1 if self._rest else middle != 0:
            return None
        found: dict[str, str] = {}
        if not _read(self._front, texts[: len(self._front)], found):
            return None
        if self._rest:
            taken = texts[len(self._front) : len(self._front) + middle]
            if "" in taken:
                return None
            found[self._rest] = ".".join(taken)
        return found if _read(self._back, texts[len(self._front) + middle :], found) else None

    def surely_fits(self, source: Template) -> bool:
        """Tells whether ``fits`` holds for whatever ``source`` binds, since both have the same captures."""
        theirs = {(part.name, part.kind, part.choices) for part in source.parts if isinstance(part, Capture)}
        return all((p.name, p.kind, p.choices) in theirs for p in self.parts if isinstance(p, Capture))

    def fits(self, bindings: Mapping[str, str]) -> bool:
        """Tells whether every capture could have taken the text that is bound to it."""
        return all(part.accepts(bindings[part.name]) for part in self.parts if isinstance(part, Capture))

    def format(self, bindings: Mapping[str, str], variables: Mapping[str, int] | None = None) -> str:
        """Returns the name that the bindings make; each capture must be bound, and formulas know variables besides."""
        return "".join([_written(part, bindings, variables or {}) for part in self.parts])


def _written(part: TemplatePart, bindings: Mapping[str, str], variables: Mapping[str, int]) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Capture):
        return part.written(bindings[part.name])
    value = part.value(lambda name: int(bindings[name]) if bindings.get(name, "").isdigit() else variables.get(name))
    if not isinstance(value, int) or value < 0:
        raise MappingError("bad-formula", f"`{{{part.text}}}` is {value!r} here", expected="a number of a name")
    return str(value)


def segment_takes(parts: tuple[TemplatePart, ...], text: str) -> bool:
    """Tells whether a dot-free piece of a template, without a ``...`` capture, matches a dot-free piece of a name."""
    segment = _segment(parts)
    return isinstance(segment, _Segment) and _read((segment,), [text], {})


def escape(name: str) -> str:
    """Returns the template that matches exactly this name."""
    return name.replace("{", "{{").replace("}", "}}")


@dataclass(frozen=True, slots=True)
class _Segment:
    """What a dot-free piece of a name must be: ``literal``, or of the form ``pattern`` where it captures."""

    literal: str
    pattern: re.Pattern[str] | None
    captures: tuple[Capture, ...]
    shifted: bool = False


def _read(segments: tuple[_Segment, ...], texts: list[str], found: dict[str, str]) -> bool:
    """Reads texts into ``found``; one function and no calls, since it runs for every name of a checkpoint."""
    for segment, text in zip(segments, texts, strict=True):
        if segment.pattern is None:
            if text != segment.literal:
                return False
            continue
        match = segment.pattern.fullmatch(text)
        if match is None:
            return False
        if segment.shifted:
            if not _read_shifted(segment.captures, match.groups(), found):
                return False
            continue
        for capture, value in zip(segment.captures, match.groups(), strict=True):
            if found.setdefault(capture.name, value) != value:
                return False
    return True


def _read_shifted(captures: tuple[Capture, ...], texts: tuple[str, ...], found: dict[str, str]) -> bool:
    for capture, text in zip(captures, texts, strict=True):
        value = capture.bound(text)
        if value is None or found.setdefault(capture.name, value) != value:
            return False
    return True


# --- parsing ---


@dataclass(frozen=True, slots=True)
class _TemplateText:
    text: str
    mark: Mark | None

    def error(self, code: str, what: str, offset: int, hint: str = _SYNTAX) -> MappingError:
        where = f"column {offset + 1}" if self.mark is None else str(self.mark.right(offset))
        return MappingError(code, what, where=where, found=self.text[:200], hint=hint)


_Placed: TypeAlias = tuple[int, TemplatePart]


def _parts(source: _TemplateText) -> Iterator[_Placed]:
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


def _literal(token: re.Match[str], source: _TemplateText) -> str:
    text = token[0]
    if text in {"{", "}"}:
        raise source.error("unpaired-brace", f"a `{text}` without its partner", token.start())
    return text[0] if text in {"{{", "}}"} else text


def _capture(body: str, offset: int, source: _TemplateText) -> Capture | Formula:
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


def _segments(placed: tuple[_Placed, ...]) -> list[list[_Placed]]:
    segments: list[list[_Placed]] = [[]]
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


def _check(segments: list[list[_Placed]], source: _TemplateText) -> None:
    for segment in segments:
        _check_segment(segment, source)
    rests = [offset for segment in segments for offset, part in segment if _is_rest(part)]
    if len(rests) > 1:
        raise source.error("two-rests", "a template can have one `...` capture", rests[1])


def _check_segment(segment: list[_Placed], source: _TemplateText) -> None:
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


def _segment(parts: tuple[TemplatePart, ...]) -> _Segment | Capture:
    """Returns the matcher of one segment, or the ``...`` capture that is no single segment."""
    if parts and isinstance(parts[0], Capture) and parts[0].kind == "rest":
        return parts[0]
    captures = tuple(part for part in parts if isinstance(part, Capture))
    if all(isinstance(part, str) for part in parts):
        return _Segment("".join(part for part in parts if isinstance(part, str)), None, ())
    shifted = any(capture.shift for capture in captures)
    return _Segment("", re.compile("".join(map(_regex, parts)), re.DOTALL), captures, shifted)


def _regex(part: TemplatePart) -> str:
    if isinstance(part, str):
        return re.escape(part)
    if isinstance(part, Formula):
        return "[0-9]{1,9}"  # a number that binds nothing
    if part.kind == "int":
        return "([0-9]{1,9})"
    if part.kind == "digits":
        return f"([0-9]{{{part.width}}})"
    if part.kind == "choice":
        return "(" + "|".join(map(re.escape, part.choices)) + ")"
    return "(.+)"


def _halves(
    segments: list[_Segment | Capture],
) -> tuple[tuple[_Segment, ...], str, tuple[_Segment, ...]]:
    """Returns the segments before the ``...`` capture, its name or ``""``, and the segments behind it."""
    front: list[_Segment] = []
    back: list[_Segment] = []
    rest = ""
    for segment in segments:
        if isinstance(segment, Capture):
            rest = segment.name
        else:
            (back if rest else front).append(segment)
    return tuple(front), rest, tuple(back)
