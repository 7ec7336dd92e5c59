"""The line of a mapping that an error is about, with a caret under the place, as compilers show it."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from shardmerge.errors import ShardmergeError

_PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d{1,7}):(?P<column>\d{1,7})(?P<more> \(source .*)?", re.DOTALL)
# What stands at the place: text in quotes, else a key or a value up to what ends it in YAML. A capture is part of it.
_TOKEN = re.compile(
    r"""'[^']*'|"(?:[^"\\]|\\.)*"|[^\s,\[\]{}:#](?:\{[^{}\s]*\}|[^,\[\]{}:#]|:(?!\s|$)|(?<!\s)\#)*""",
)
# Columns of a line that are shown: with number and margin it fits a terminal of 100.
_WIDTH = 92
_BEFORE = 40


def error_lines(error: ShardmergeError) -> list[str]:
    """Returns an error as lines of text, the line of the mapping below the place."""
    lines = error.lines()
    at = f"  at: {error.where}"
    if at in lines:
        below = lines.index(at) + 1
        lines[below:below] = snippet(error.where)
    return lines


def place(where: str) -> dict[str, object]:
    """Returns ``line`` and ``column``, both from 1, and the line's text as ``snippet``; nothing for another place."""
    found = _PLACE.fullmatch(where)
    if found is None or not int(found["line"]):
        return {}
    line = int(found["line"])
    return {"line": line, "column": int(found["column"]), "snippet": _line(Path(found["file"]), line)}


def snippet(where: str) -> list[str]:
    """Returns the line at ``file:line:column``, both from 1, and a caret below it; nothing if it cannot be read."""
    found = _PLACE.fullmatch(where)
    if found is None or found["more"] or not int(found["line"]):
        return []
    line, column = int(found["line"]), int(found["column"]) - 1
    text = _line(Path(found["file"]), line)
    if not 0 <= column < len(text):
        return []
    token = _TOKEN.match(text, column)
    length = len(token[0].rstrip()) if token else 1
    left = max(0, min(column - _BEFORE, len(text) - _WIDTH))
    shown = text[left : left + _WIDTH].rstrip()
    carets = "^" * max(min(length, len(shown) - (column - left)), 1)
    margin = " " * len(found["line"])
    return [f"  {margin} |", f"  {line} | {shown}", f"  {margin} | {' ' * (column - left)}{carets}"]


def _line(path: Path, number: int) -> str:
    """Returns a line of a text file, empty where there is none; control characters as spaces, since it is printed."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = next(islice(file, number - 1, number), "")
    except OSError:
        return ""
    return "".join(char if char.isprintable() else " " for char in found.rstrip("\n"))
