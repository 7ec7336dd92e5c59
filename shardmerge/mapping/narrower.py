"""Which of two templates is the narrower one: every name that it matches, the other matches too, and not the reverse.

Templates are compared as sets of names, by their segments; what they bind does not count. The answer is exact but for
a template that has one capture twice and for segments of several captures, where "no" may mean "not known": two
rules are then ambiguous and an error, never a guess. Nor is a name that is computed (`layers.{i + 16}`) the narrower
one: where stacked layers meet others, somebody has miscounted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from shardmerge.formulas import Formula
from shardmerge.mapping.captures import Capture, TemplatePart, cut_at_dots
from shardmerge.mapping.pattern import Template, segment_takes

_SegmentParts: TypeAlias = tuple[TemplatePart, ...]
_NUMBER = re.compile("[0-9]{1,9}")


def is_narrower(one: Template, other: Template) -> bool:
    """Tells whether ``one`` matches a proper part of the names that ``other`` matches, and computes none of them."""
    return not _is_computed(one) and covers(other, one) and not covers(one, other)


def effective(target: Template, sources: Sequence[Template]) -> Template:
    """Returns a rule's target as narrow as the source names make it: ``x.{i}`` from ``y.{i:int}`` is ``x.{i:int}``."""
    if not sources:
        return target
    parts = tuple(_narrowed(part, sources) for part in target.parts)
    return target if parts == target.parts else replace(target, parts=parts, text=repr(parts))


def _narrowed(part: TemplatePart, sources: Sequence[Template]) -> TemplatePart:
    if not isinstance(part, Capture) or part.kind != "text":
        return part
    every = [one for each in sources for one in each.parts if isinstance(one, Capture) and one.name == part.name]
    kinds = {(one.kind, one.choices, one.width) for one in every}
    narrow = len(kinds) == 1 and every[0].kind in ("int", "digits", "choice")
    return replace(every[0], shift=0) if narrow else part


def _is_computed(template: Template) -> bool:
    return any(isinstance(part, Formula) or (isinstance(part, Capture) and part.shift) for part in template.parts)


def alike(one: Template, other: Template) -> bool:
    """Tells whether two templates match the same names, whatever their captures are called."""
    return one.text == other.text or (covers(one, other) and covers(other, one))


def covers(general: Template, narrow: Template) -> bool:
    """Tells whether ``general`` matches every name that ``narrow`` does."""
    if general.text == narrow.text:
        return True
    names = [part.name for part in general.parts if isinstance(part, Capture)]
    if len(names) != len(set(names)) or not _ends_fit(general, narrow):
        return False
    front, rest, back = _cut(_segments(general))
    segments = _segments(narrow)
    theirs, open_, end = _cut(segments)
    if not rest:
        return not open_ and len(theirs) == len(front) and all(map(_takes, front, theirs))
    if open_:
        if len(theirs) < len(front) or len(end) < len(back):
            return False
        middle = [*theirs[len(front) :], *end[: len(end) - len(back)]]
    else:
        if len(segments) <= len(front) + len(back):
            return False
        middle, end = theirs[len(front) : len(theirs) - len(back)], theirs
    return (
        all(map(_takes, front, theirs))
        and all(map(_takes, back, end[len(end) - len(back) :]))
        and all(middle)  # `...` takes no empty segment
    )


def _ends_fit(general: Template, narrow: Template) -> bool:
    """Most pairs differ in their first letters: they need no closer look."""
    return narrow.head.startswith(general.head) or general.head.startswith(narrow.head)


def _segments(template: Template) -> list[_SegmentParts]:
    segments = cut_at_dots(tuple((0, part) for part in template.parts))
    return [tuple(part for _, part in segment) for segment in segments]


def _cut(segments: list[_SegmentParts]) -> tuple[list[_SegmentParts], bool, list[_SegmentParts]]:
    """Returns what stands before a ``...`` capture, whether there is one, and what stands behind it."""
    for index, segment in enumerate(segments):
        if len(segment) == 1 and _kind(segment[0]) == "rest":
            return segments[:index], True, segments[index + 1 :]
    return segments, False, []


def _kind(part: TemplatePart) -> str:
    return part.kind if isinstance(part, Capture) else "int" if isinstance(part, Formula) else ""


def _takes(general: _SegmentParts, narrow: _SegmentParts) -> bool:
    """Tells whether a segment takes every text that another one takes."""
    if len(general) == 1 and _kind(general[0]) in ("text", "each"):
        return bool(narrow)
    if all(isinstance(part, str) for part in narrow):
        return segment_takes(general, "".join(map(str, narrow)))
    return len(general) == len(narrow) and all(map(_part_takes, general, narrow))


def _part_takes(general: TemplatePart, narrow: TemplatePart) -> bool:
    if isinstance(general, str):
        return general == narrow or (isinstance(narrow, Capture) and narrow.choices == (general,))
    if isinstance(general, Formula) or general.kind == "int":
        least = max(general.shift, 0) if isinstance(general, Capture) else 0
        return (
            all(_NUMBER.fullmatch(text) and int(text) >= least for text in _words(narrow)) and _least(narrow) >= least
        )
    if general.kind == "digits":
        words = _words(narrow)
        fixed = isinstance(narrow, Capture) and narrow.kind == "digits" and narrow.width == general.width
        return fixed or (bool(words) and all(len(text) == general.width and text.isdigit() for text in words))
    if general.kind == "choice":
        return bool(_words(narrow)) and set(_words(narrow)) <= set(general.choices)
    return True


def _words(part: TemplatePart) -> tuple[str, ...]:
    """The texts that a part can be, where they are known."""
    return (part,) if isinstance(part, str) else part.choices if isinstance(part, Capture) else ()


def _least(part: TemplatePart) -> int:
    """The smallest number that a part can be; -1 where it need not be a number."""
    if _words(part):
        return 1 << 62
    if isinstance(part, Formula):
        return 0
    if isinstance(part, Capture) and part.kind in ("int", "digits"):
        return max(part.shift, 0)
    return -1
