r"""Patterns of names that a checkpoint carries, matched in a time that nobody can make long.

Megatron-DeepSpeed and AutoTP write regular expressions, which DeepSpeed gives to ``re.match``. A file may be of
somebody hostile, and ``re`` takes hours for some patterns of ten characters. What real ones are made of needs no going
back: characters, ``.``, ``\d``, ``\w``, sets, ``* + ?``, ``^`` and ``$``.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from shardmerge.errors import CheckpointError

_DIGITS = frozenset(string.digits)
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": _DIGITS, "w": _WORD}
# They mean something that is not read.
_OTHER = frozenset("()|{}")
# Characters of a pattern, and steps of all names through all patterns: forty times what Megatron's 15 patterns take for
# the 1,200 names of 100 layers, and three seconds.
_LONGEST, _MOST_STEPS = 1024, 1 << 22


class _Step(NamedTuple):
    """One character of a set (``None``: any), as often as its mark says."""

    characters: frozenset[str] | None
    repeated: bool
    optional: bool


@dataclass(slots=True)
class NamePatterns:
    r"""Patterns of one kind; ``find`` gives those that match a name.

    Attributes
    ----------
    names
        Patterns that are one whole name, ``^a\.weight$``, by that name.
    others
        Steps of the rest, whether they end with ``$``, and their texts.
    where
        The file, for errors.
    steps
        Taken so far.
    """

    names: dict[str, str]
    others: tuple[tuple[tuple[_Step, ...], bool, str], ...]
    where: str
    steps: int = 0

    @staticmethod
    def of(patterns: Iterable[str], where: str) -> NamePatterns:
        """Returns the patterns, read.

        Raises
        ------
        CheckpointError
            ``name-pattern``: one with groups, alternatives or counts.
        """
        names: dict[str, str] = {}
        others: list[tuple[tuple[_Step, ...], bool, str]] = []
        for text in patterns:
            steps, whole = _parsed(text, where)
            plain = _plain(steps)
            if whole and plain is not None:
                names[plain] = text
            else:
                others.append((steps, whole, text))
        return NamePatterns(names, tuple(others), where)

    def find(self, name: str) -> list[str]:
        """Returns the texts of all patterns that match a name from its beginning on, as ``re.match`` does.

        Raises
        ------
        CheckpointError
            ``name-pattern``: all names together take more steps than any model's.
        """
        found = [self.names[name]] if name in self.names else []
        return found + [text for steps, whole, text in self.others if self._matches(steps, name, whole=whole)]

    def _matches(self, steps: tuple[_Step, ...], name: str, *, whole: bool) -> bool:
        """Walks all ways through the steps at once: as many as there are steps, for each character."""
        here = _reached(steps, {0})
        for character in name:
            if len(steps) in here and not whole:
                return True
            self.steps += len(here)
            if self.steps > _MOST_STEPS:
                raise _unread(f"{len(self.others)} patterns that are no names", self.where)
            here = _reached(steps, _after(steps, here, character))
            if not here:
                return False
        return len(steps) in here


def _parsed(text: str, where: str) -> tuple[tuple[_Step, ...], bool]:
    """Returns the steps of a pattern, and whether it must match to the end of the name."""
    if len(text) > _LONGEST:
        raise _unread(text[:80], where)
    at = 1 if text.startswith("^") else 0
    steps: list[_Step] = []
    while at < len(text):
        if text[at] == "$" and at == len(text) - 1:
            return tuple(steps), True
        characters, at = _one(text, at, where)
        mark = text[at] if at < len(text) and text[at] in "*+?" else ""
        at += len(mark)
        if at < len(text) and text[at] in "*+?":  # no greedy or possessive mark changes what matches, but none is seen
            raise _unread(text, where)
        steps.append(_Step(characters, bool(mark) and mark in "*+", bool(mark) and mark in "*?"))
    return tuple(steps), False


def _one(text: str, at: int, where: str) -> tuple[frozenset[str] | None, int]:
    """Returns the set of characters at a place of a pattern, and the place after it."""
    here = text[at]
    if here == "\\" and at + 1 < len(text):
        escaped = text[at + 1]
        if escaped.isalnum() and escaped not in _CLASSES:
            raise _unread(text, where)
        return _CLASSES.get(escaped, frozenset(escaped)), at + 2
    if here == "[":
        end = text.find("]", at + 2)
        if end < 0:
            raise _unread(text, where)
        return _set(text[at + 1 : end], text, where), end + 1
    if here in _OTHER or here in "*+?^$\\]":
        raise _unread(text, where)
    return (None if here == "." else frozenset(here)), at + 1


def _set(inside: str, text: str, where: str) -> frozenset[str]:
    """Returns the characters of ``[0-9a-f_]``."""
    found: set[str] = set()
    at = 0
    while at < len(inside):
        if inside[at] in "^\\[" or (inside[at] == "-" and 0 < at < len(inside) - 1):
            raise _unread(text, where)
        if inside[at + 1 : at + 2] == "-" and at + 2 < len(inside):
            found.update(map(chr, range(ord(inside[at]), min(ord(inside[at + 2]), 127) + 1)))
            at += 3
        else:
            found.add(inside[at])
            at += 1
    if not found:
        raise _unread(text, where)
    return frozenset(found)


def _plain(steps: tuple[_Step, ...]) -> str | None:
    """Returns the one name that steps match, if it is one."""
    sets = [step.characters for step in steps if not step.repeated and not step.optional]
    letters = [next(iter(one)) for one in sets if one is not None and len(one) == 1]
    return "".join(letters) if len(letters) == len(steps) else None


def _after(steps: tuple[_Step, ...], here: set[int], character: str) -> set[int]:
    """Returns the places after one more character."""
    found: set[int] = set()
    for at in here:
        if at < len(steps):
            characters = steps[at].characters
            if characters is None or character in characters:
                found |= {at, at + 1} if steps[at].repeated else {at + 1}
    return found


def _reached(steps: tuple[_Step, ...], places: set[int]) -> set[int]:
    """Returns the places, and those behind steps that may be left out."""
    found = set(places)
    for at in sorted(places):
        ahead = at
        while ahead < len(steps) and steps[ahead].optional and ahead + 1 not in found:
            ahead += 1
            found.add(ahead)
    return found


def _unread(found: str, where: str) -> CheckpointError:
    return CheckpointError(
        "name-pattern",
        "a pattern of names in the checkpoint is not understood",
        where=where,
        found=found,
        expected="characters, `.`, \\d, \\w, [sets] and the marks * + ?",
    )
