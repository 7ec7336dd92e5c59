"""Regular expressions over module names, in linear time: those that people write into adapter_config.json.

peft hands ``rank_pattern``, ``alpha_pattern``, ``target_modules`` and ``exclude_modules`` to Python's ``re``, which may
take for ever on an expression of a stranger. Here all ways are followed at once (Thompson, 1968), so a name costs its
length times the length of the expression. What has no such machine (references, looking around) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple, TypeAlias

# Instructions of an expression, repetitions written out. One that needs more is no pattern of module names.
_MOST = 5000
# Groups inside of each other: each takes four calls of the reader, of 1,000 that Python allows. People write two.
_DEEPEST = 50

_Accepts: TypeAlias = Callable[[str], bool]


class _Step(NamedTuple):
    """An instruction: takes a character, goes on at one or two places, or asks where in the name it is."""

    kind: Literal["take", "go", "begin", "end", "edge", "inside"]
    ways: tuple[int, ...] = (1,)
    accepts: _Accepts | None = None


_Program: TypeAlias = tuple[_Step, ...]

_CLASSES: dict[str, _Accepts] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}


@lru_cache(maxsize=256)
def compiled(text: str) -> _Program:
    """Returns the program of an expression.

    Raises
    ------
    ValueError
        It is none, or uses what only a backtracking matcher has.
    """
    reader = _Reader(text)
    program = reader.alternatives()
    if reader.at < len(text):
        raise ValueError("unbalanced )")
    return program


def matches(text: str, name: str) -> bool:
    """Whether an expression describes a whole name, as ``re.fullmatch``; raises as ``compiled``."""
    program = compiled(text)
    states = _followed(program, {0}, _kinds(name, 0))
    for place, char in enumerate(name):
        taken = {one + 1 for one in states if one < len(program) and _takes(program[one], char)}
        states = _followed(program, taken, _kinds(name, place + 1))
    return len(program) in states


def _kinds(name: str, place: int) -> set[str]:
    """Returns the steps that cost no character between two of a name."""
    before, after = (bool(one) and _CLASSES["w"](one) for one in (name[place - 1 : place], name[place : place + 1]))
    found = {"go", "edge" if before != after else "inside"}
    return found | ({"begin"} if not place else set()) | ({"end"} if place == len(name) else set())


def _takes(step: _Step, char: str) -> bool:
    return step.accepts is not None and step.accepts(char)


def _followed(program: _Program, states: set[int], kinds: set[str]) -> set[int]:
    """Returns where some states lead without a character."""
    found, pending = set[int](), list(states)
    while pending:
        place = pending.pop()
        if place in found:
            continue
        found.add(place)
        if place == len(program):
            continue
        step = program[place]
        if step.kind in kinds:
            pending += [place + way for way in step.ways]
    return found


def _repeated(body: _Program, least: int, most: int | None) -> _Program:
    optional = (_Step("go", (1, len(body) + 1)), *body)
    if most is None:
        again = (_Step("go", (1, len(body) + 2)), *body, _Step("go", (-len(body) - 1,)))
        return _bounded(body * least + again if len(body) * least <= _MOST else (_Step("go"),) * (_MOST + 1))
    if len(optional) * most > _MOST:
        raise ValueError("it repeats too much")
    return body * least + optional * (most - least)


def _bounded(program: _Program) -> _Program:
    if len(program) > _MOST:
        raise ValueError("it is too long")
    return program


@dataclass(slots=True)
class _Reader:
    """Reads an expression from left to right."""

    text: str
    at: int = 0
    depth: int = 0

    def alternatives(self) -> _Program:
        """What stands up to a closing bracket or the end."""
        if self.depth > _DEEPEST:
            raise ValueError("its groups are nested too deep")
        found = self._sequence()
        while self._next("|"):
            other = self._sequence()
            found = (_Step("go", (1, len(found) + 2)), *found, _Step("go", (len(other) + 1,)), *other)
        return _bounded(found)

    def _sequence(self) -> _Program:
        found: _Program = ()
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            found = _bounded(found + self._repeats(self._atom()))
        return found

    def _repeats(self, body: _Program) -> _Program:
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        char = self.text[self.at : self.at + 1]
        if char in counts and char:
            self.at += 1
            least, most = counts[char]
        elif char == "{" and (said := self._counts()) is not None:
            least, most = said
        else:
            return body
        self._next("?")  # the shortest match first: the same names
        if self.text[self.at : self.at + 1] in ("+", "*", "?"):
            raise ValueError("two repetitions behind each other")
        return _repeated(body, least, most)

    def _counts(self) -> tuple[int, int | None] | None:
        inside, closed, _ = self.text[self.at + 1 :].partition("}")
        least, comma, most = inside.partition(",")
        if not closed or not (least or most) or not all(not one or one.isdecimal() for one in (least, most)):
            return None  # a brace that means itself
        self.at += len(inside) + 2
        low, high = int(least or 0), int(most) if most else None if comma else int(least or 0)
        if low > _MOST or (high is not None and not low <= high <= _MOST):
            raise ValueError("it repeats too much")
        return low, high

    def _atom(self) -> _Program:
        char = self._taken()
        match char:
            case "(":
                return self._group()
            case "[":
                return (_Step("take", accepts=self._set()),)
            case ".":
                return (_Step("take", accepts=lambda one: one != "\n"),)
            case "^" | "$":
                return (_Step("begin" if char == "^" else "end"),)
            case "\\":
                return self._escaped()
            case "*" | "+" | "?":
                raise ValueError("nothing to repeat")
        return (_Step("take", accepts=char.__eq__),)

    def _group(self) -> _Program:
        if self._next("?") and not self._next(":"):
            _, named, rest = self.text[self.at :].partition(">")
            if not self.text.startswith("P<", self.at) or not named:
                raise ValueError("a group that looks around, or sets flags")
            self.at = len(self.text) - len(rest)
        self.depth += 1
        found = self.alternatives()
        self.depth -= 1
        if not self._next(")"):
            raise ValueError("missing )")
        return found

    def _escaped(self) -> _Program:
        char = self._taken()
        if char in "AZ":
            return (_Step("begin" if char == "A" else "end"),)
        if char in "bB":
            return (_Step("edge" if char == "b" else "inside"),)
        return (_Step("take", accepts=_class_of(char)),)

    def _set(self) -> _Accepts:
        negated = self._next("^")
        parts: list[_Accepts] = []
        while not self._next("]") or not parts:
            char = self.text[self.at - 1] if not parts and self.text[self.at - 1 : self.at] == "]" else self._taken()
            if char == "\\":
                parts.append(_class_of(self._taken()))
            elif self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                parts.append(partial(_between, char, self._taken()))
            else:
                parts.append(char.__eq__)
        return partial(_any_of, tuple(parts), negated)

    def _taken(self) -> str:
        if self.at >= len(self.text):
            raise ValueError("it ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _next(self, char: str) -> bool:
        if self.text.startswith(char, self.at):
            self.at += 1
            return True
        return False


def _class_of(char: str) -> _Accepts:
    if char in _CLASSES:
        return _CLASSES[char]
    if char.lower() in _CLASSES:
        return partial(_any_of, (_CLASSES[char.lower()],), True)
    if char.isalnum():
        raise ValueError(f"\\{char}")
    return char.__eq__


def _between(first: str, last: str, char: str) -> bool:
    return first <= char <= last


def _any_of(parts: Sequence[_Accepts], negated: bool, char: str) -> bool:  # one signature for all
    return any(part(char) for part in parts) is not negated
