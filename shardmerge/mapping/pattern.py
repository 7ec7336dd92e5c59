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
from collections.abc import Mapping
from dataclasses import dataclass, field

from shardmerge.errors import MappingError
from shardmerge.formulas import Formula
from shardmerge.mapping.captures import (
    Capture,
    TemplatePart,
    TemplateText,
    check_segments,
    cut_at_dots,
    read_parts,
)
from shardmerge.mapping.yaml_nodes import Mark


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
        source = TemplateText(text, mark)
        if not text:
            raise source.error("empty-template", "a template cannot be empty", 0)
        placed = tuple(read_parts(source))
        parts = tuple(part for _, part in placed)
        segments = cut_at_dots(placed)
        check_segments(segments, source)
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
        raise MappingError(
            "bad-formula", f"`{{{part.text}}}` is {value!r} here", expected="a number that can be part of a name"
        )
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
