"""Names of tensors as few patterns: ``layers.0-31.mlp.{gate,up}_proj.weight``. Pure.

A pattern is a product: for every segment of a name the texts it may have. Tensors share one if they have the same type
and shape, and names that differ in numbers only, or in a word near their end. A pattern stands for all names
of its product, no more and no fewer: what is missing or different gets a pattern of its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from os.path import commonprefix
from typing import Generic, TypeAlias, TypeVar

Kind = TypeVar("Kind", bound=Hashable)

# The texts of a segment.
Choices: TypeAlias = tuple[str, ...]

# As Python writes a number, so that the number gives the text back: `007` is a word.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
# A kind that so few of a pattern's names have, beside one of another, is worth a second look: one of four.
_RARE = 3
# Words stand together in these segments, counted from the end: `{q,k}_proj.weight`, `norm.{weight,bias}`, and inside a
# layer `{q,k}_proj.lora_A.default.weight`.
_WORDS, _WORDS_OF_LAYER = (-1, -2), (-3, -4)
# More texts of a segment than these are not spelt out.
_MOST_TEXTS = 8


@dataclass(frozen=True, slots=True)
class NamePattern(Generic[Kind]):
    """Names of one kind.

    Attributes
    ----------
    segments
        For every segment of the names its texts; the names are the product of them.
    kind
        What the tensors have in common.
    usual
        The kind of nearly all names that differ from these in numbers only; None where this is it, or where there is no
        such kind.
    """

    segments: tuple[Choices, ...]
    kind: Kind
    usual: Kind | None = None

    @property
    def count(self) -> int:
        """Number of names."""
        return prod(map(len, self.segments))

    def names(self) -> Iterator[str]:
        """Yields the names."""
        return map(".".join, product(*self.segments))


def name_patterns(kinds: Iterable[tuple[str, Kind]]) -> list[NamePattern[Kind]]:
    """Returns patterns that stand for each name exactly once, in the order of their first names.

    Parameters
    ----------
    kinds
        Names, each once, and what must be the same in a pattern, such as type and shape.

    Notes
    -----
    Cost: the names are split once and their numbers sorted; everything else is a few steps a name.
    """
    numbers: dict[tuple[str | None, ...], dict[Kind, list[tuple[str, ...]]]] = defaultdict(lambda: defaultdict(list))
    for name, kind in kinds:
        skeleton, found = _apart(name)
        numbers[skeleton][kind].append(found)
    patterns = [one for skeleton, by_kind in numbers.items() for one in _of_skeleton(skeleton, by_kind)]
    for at in (*_WORDS, *_WORDS_OF_LAYER):
        patterns = _braced(patterns, at)
    return patterns


def segment_text(choices: Choices) -> str:
    """Returns the texts of a segment as one: ``0-31``, ``{0-3,5}``, ``{q,k,v}_proj``."""
    if len(choices) == 1:
        return choices[0]
    if is_number(choices):
        runs = [f"{low}-{high}" if high > low else str(low) for low, high in _runs(sorted(map(int, choices)))]
        return runs[0] if len(runs) == 1 else _in_braces(runs)
    before, behind = _common_ends(choices)
    return f"{before}{_in_braces([one[len(before) : len(one) - len(behind)] for one in choices])}{behind}"


def _in_braces(texts: Sequence[str]) -> str:
    if len(texts) > _MOST_TEXTS:
        texts = [*texts[: _MOST_TEXTS - 1], f"... {len(texts) - _MOST_TEXTS + 1} more"]
    return f"{{{','.join(texts)}}}"


def is_number(choices: Choices) -> bool:
    """Tells whether a segment counts."""
    return _NUMBER.fullmatch(choices[0]) is not None


def _apart(name: str) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """Returns the words of a name, None in the place of every number, and its numbers."""
    segments = name.split(".")
    counted = [one.isdigit() and _NUMBER.fullmatch(one) is not None for one in segments]
    words = tuple(None if number else one for one, number in zip(segments, counted, strict=True))
    return words, tuple(one for one, number in zip(segments, counted, strict=True) if number)


def _of_skeleton(
    skeleton: tuple[str | None, ...], by_kind: dict[Kind, list[tuple[str, ...]]]
) -> Iterator[NamePattern[Kind]]:
    most = max(by_kind, key=lambda kind: len(by_kind[kind]))
    for kind, rows in by_kind.items():
        rare = kind != most and _RARE * len(rows) <= len(by_kind[most])
        for box in _boxes(sorted(rows, key=lambda row: tuple(map(int, row)))):
            numbers = iter(box)
            segments = tuple(next(numbers) if one is None else (one,) for one in skeleton)
            yield NamePattern(segments, kind, most if rare else None)


def _boxes(rows: list[tuple[str, ...]]) -> list[tuple[Choices, ...]]:
    """Returns products that hold each of the rows exactly once; equal sets of rows, sorted, give equal products."""
    if not rows[0]:
        return [()]
    inner: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for first, *rest in rows:
        inner[first].append(tuple(rest))
    alike: dict[tuple[tuple[Choices, ...], ...], list[str]] = defaultdict(list)
    for first, rests in inner.items():
        alike[tuple(_boxes(rests))].append(first)
    return [(tuple(firsts), *box) for boxes, firsts in alike.items() for box in boxes]


def _braced(patterns: list[NamePattern[Kind]], at: int) -> list[NamePattern[Kind]]:
    """Puts patterns together that differ in the words of one segment only."""
    found: dict[Hashable, tuple[NamePattern[Kind], list[str]]] = {}
    for index, one in enumerate(patterns):
        worded = len(one.segments) >= -at and _is_worded(one.segments, at)
        key = (*_around(one, at), one.kind, one.usual) if worded else index
        _, words = found.setdefault(key, (one, []))
        words.extend(one.segments[at] if worded else ())
    return [_with_words(one, at, tuple(words)) for one, words in found.values()]


def _is_worded(segments: tuple[Choices, ...], at: int) -> bool:
    if at in _WORDS:
        return not is_number(segments[at])
    return any(map(is_number, segments[:at])) and not any(map(is_number, segments[at:]))


def _around(one: NamePattern[Kind], at: int) -> tuple[tuple[Choices, ...], tuple[Choices, ...]]:
    return one.segments[:at], one.segments[len(one.segments) + at + 1 :]


def _with_words(one: NamePattern[Kind], at: int, words: Choices) -> NamePattern[Kind]:
    before, behind = _around(one, at)
    return replace(one, segments=(*before, words, *behind)) if words else one


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yields the first and the last of numbers that follow one another."""
    low = numbers[0]
    for one, following in zip(numbers, [*numbers[1:], None], strict=True):
        if following != one + 1:
            yield low, one
            low = following or 0


def _common_ends(words: Choices) -> tuple[str, str]:
    """Returns what all words begin and end with, cut where a part of a word ends: at ``_``, or before a number."""
    before = commonprefix(words)
    if not all(word[len(before) :].isdigit() for word in words):
        before = before[: before.rfind("_") + 1]
    rests = [word[len(before) :] for word in words]
    behind = commonprefix([rest[::-1] for rest in rests])[::-1]
    return before, behind[behind.find("_") :] if "_" in behind else ""
