"""Nearest names, and lists of names short enough for a message.

``difflib`` alone takes seconds for one word against 100,000 tensor names. An index keeps them sorted
forwards and backwards, so that the names sharing the most text at either end are a few steps from the word's
own place; only those are compared in full.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from functools import cached_property

# Compared in full beyond this many names: 24 on each side of the word's place, in both orders.
_FEW = 200
_AROUND = 24

# SequenceMatcher is quadratic; a hostile file may hold names of any length.
_LONGEST_WORD = 256

_LEAST_ALIKE = 0.6


class NameIndex:
    """Names to be searched for the nearest ones, sorted when first asked."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    @cached_property
    def _forwards(self) -> list[str]:
        return sorted({name for name in self._names if len(name) <= _LONGEST_WORD})

    @cached_property
    def _backwards(self) -> list[str]:
        return sorted(name[::-1] for name in self._forwards)

    def near(self, word: str, limit: int = 3, least: float = _LEAST_ALIKE) -> list[str]:
        """Returns up to ``limit`` names that look like ``word``, the most alike first."""
        from difflib import SequenceMatcher  # only an error needs it

        if len(word) > _LONGEST_WORD:
            return []
        compare = SequenceMatcher(b=word, autojunk=False)
        scored = []
        for name in self._close_by(word):
            compare.set_seq1(name)
            if compare.quick_ratio() >= least and (ratio := compare.ratio()) >= least:
                scored.append((-ratio, name))
        return [name for _, name in sorted(scored)[:limit]]

    def _close_by(self, word: str) -> Collection[str]:
        if len(self._forwards) <= _FEW:
            return self._forwards
        found = set(_around(self._forwards, word))
        found.update(name[::-1] for name in _around(self._backwards, word[::-1]))
        return found


def _around(ordered: list[str], word: str) -> list[str]:
    place = bisect_left(ordered, word)
    return ordered[max(0, place - _AROUND) : place + _AROUND]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns a hint: the known words nearest to ``word``, or all of them if they are few, or nothing.

    Never the word itself: a name may be known and still say nothing, such as a key of a config that is null.
    """
    words = sorted(set(known) - {word})
    alike = NameIndex(words).near(word)
    if alike:
        return "did you mean " + " or ".join(f"`{name}`" for name in alike) + "?"
    return f"known here: {', '.join(words)}" if 0 < len(words) <= 20 else ""


def listed(names: Collection[str], most: int = 5) -> str:
    """Returns ``a, b, c and 12 more``; a name with control characters is escaped, a very long one cut."""
    first = [printable(name) for name, _ in zip(names, range(most), strict=False)]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def printable(name: str) -> str:
    """Returns a name from a file as it can go to a terminal."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def count(number: int, thing: str) -> str:
    """Returns ``1 tensor`` or ``3 tensors``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
