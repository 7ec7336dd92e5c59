"""A value of somebody else's file as text for a message, in bounded work.

``repr`` of 3.4 KB of pickle took 9 s: 22 dictionaries, each holding the next one twice. Here the text is made piece by
piece and the making ends with the room for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType

# Characters of a value in an error's line.
_ROOM = 120
# Deeper than any value that a message is about, and far from the interpreter's limit.
_DEPTH = 8
# Python refuses to print integers of more than 4,300 digits.
_LONGEST_INTEGER = 256


def shown(value: object, most: int = _ROOM) -> str:
    """Returns a value as ``repr`` would show it, cut off after ``most`` characters with an ellipsis.

    Plain values, lists, tuples, sets and mappings are spelt out; of any other object the class is named, and nothing of
    it is called.
    """
    text = ""
    for piece in _pieces(value, most, _DEPTH):
        text += piece
        if len(text) > most:
            return text[: most - 3] + "..."
    return text


def inspecting(path: str) -> str:
    """Returns the command that lists what a checkpoint holds, for a hint."""
    from shlex import quote  # noqa: PLC0415  # for an error alone

    return f"`shardmerge inspect {quote(path)}`"


def _pieces(value: object, most: int, depth: int) -> Iterator[str]:
    if isinstance(value, (str, bytes)):
        yield repr(value[: most + 1])
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _LONGEST_INTEGER:
        yield f"an integer of {value.bit_length()} bits"
    elif value is None or isinstance(value, (bool, int, float, complex)):
        yield repr(value)
    elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
        yield from _collection(value, most, depth)
    else:
        yield f"<{type(value).__name__}>"


def _collection(
    value: list[object] | tuple[object, ...] | set[object] | frozenset[object] | Mapping[object, object],
    most: int,
    depth: int,
) -> Iterator[str]:
    start, end = ("[", "]") if isinstance(value, list) else ("(", ")") if isinstance(value, tuple) else ("{", "}")
    yield start
    if depth == 0:
        yield "..."
    else:
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from _pieces(item, most, depth - 1)
            if isinstance(value, Mapping):
                yield ": "
                yield from _pieces(value[item], most, depth - 1)
    yield end


class Displayed:
    """A public value that is shown in a few lines, and as HTML in a notebook.

    How, ``shardmerge.display`` knows, which knows all of these values; they do not know it.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return str(_display().text(self))

    def _repr_html_(self) -> str:
        return str(_display().html(self))


def _display() -> ModuleType:
    return import_module("shardmerge.display")
