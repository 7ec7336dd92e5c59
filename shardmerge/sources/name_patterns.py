r"""Patterns of names that a checkpoint carries, matched in a time that nobody can make long.

Megatron-DeepSpeed and AutoTP write regular expressions, which DeepSpeed gives to ``re.match``. A file may be of
somebody hostile, and ``re`` takes hours for some patterns of ten characters. So only what real ones are made of is
given to it: characters, ``.``, ``\d``, ``\w``, sets, three marks ``* + ?`` at most, ``^`` and ``$``. Then it takes no
more steps than the name is long, to the power of the marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shardmerge.errors import CheckpointError

# One character of a name, and how often: what a pattern may consist of.
_ATOM = r"(?:[^\\^$*+?()\[\]{}|]|\\[dw]|\\[^\w\s]|\\ |\[(?:[\w.]-[\w.]|[\w.])+\])"
_PATTERN = re.compile(rf"\^?(?:{_ATOM}[*+?]?)*\$?")
_MARKED = re.compile(rf"{_ATOM}([*+?]?)")
_PLAIN = re.compile(r"\^((?:[\w-]|\\[^\w\s])*)\$")
# Characters and marks of a pattern: twice what any real one has.
_LONGEST, _MOST_MARKS = 1024, 3
# Steps of all names through all patterns, as many as may be: a second. The 1,200 names of 100 layers of Megatron take
# a hundredth of them with its 15 patterns.
_MOST_STEPS = 1 << 27


@dataclass(slots=True)
class NamePatterns:
    r"""Patterns of one kind; ``find`` gives those that match a name.

    Attributes
    ----------
    names
        Patterns that are one whole name, ``^a\.weight$``, by that name.
    others
        The rest, each with its marks.
    where
        The file, for errors.
    steps
        Taken so far, at most.
    """

    names: dict[str, str]
    others: tuple[tuple[re.Pattern[str], int], ...]
    where: str
    steps: int = 0

    @staticmethod
    def of(patterns: Iterable[str], where: str) -> NamePatterns:
        """Returns the patterns, read.

        Raises
        ------
        CheckpointError
            ``name-pattern``: one with groups, alternatives or counts, or with more marks.
        """
        names: dict[str, str] = {}
        others: list[tuple[re.Pattern[str], int]] = []
        for text in patterns:
            plain = _PLAIN.fullmatch(text) if len(text) <= _LONGEST else None
            if plain is not None:
                names[plain[1].replace("\\", "")] = text
                continue
            if len(text) > _LONGEST or _PATTERN.fullmatch(text) is None:
                raise _unread(text[:80], where)
            marks = sum(1 for mark in _MARKED.findall(text) if mark)
            if marks > _MOST_MARKS:
                raise _unread(text[:80], where)
            others.append((_compiled(text, where), marks))
        return NamePatterns(names, tuple(others), where)

    def find(self, name: str) -> list[str]:
        """Returns the texts of all patterns that match a name from its beginning on, as ``re.match`` does.

        Raises
        ------
        CheckpointError
            ``name-pattern``: all names together take more steps than any model's.
        """
        found = [self.names[name]] if name in self.names else []
        for pattern, marks in self.others:
            self.steps += (len(name) + 1) ** marks + len(pattern.pattern)
            if self.steps > _MOST_STEPS:
                raise _unread(f"{len(self.others)} patterns that are no names", self.where)
            if pattern.match(name):
                found.append(pattern.pattern)
        return found


def _compiled(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error:  # a set from a higher character to a lower one
        raise _unread(text[:80], where) from None


def _unread(found: str, where: str) -> CheckpointError:
    return CheckpointError(
        "name-pattern",
        "a pattern of names in the checkpoint is not understood",
        where=where,
        found=found,
        expected=rf"characters, `.`, \d, \w, [sets] and at most {_MOST_MARKS} marks * + ?",
    )
