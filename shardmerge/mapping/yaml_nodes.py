"""YAML text as a small tree of scalars, lists and tables that remember where they stand. See ``yaml_text``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeAlias

# A mapping of a few kilobytes is usual; PyYAML takes seconds for a megabyte.
LARGEST_TEXT = 1 << 20

QUOTE_BRACES = 'inside [ ] put quotes around names with braces: ["trained:{rest...}", "base:{rest...}"]'


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file, lines and columns counted from 1; line 0 is the whole of it."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def right(self, columns: int) -> Mark:
        """Returns the place ``columns`` further on the same line."""
        return Mark(self.file, self.line, self.column + columns)


@dataclass(frozen=True, slots=True)
class Scalar:
    """A piece of text.

    Attributes
    ----------
    text
        As written, without quotes.
    mark
        Where it begins; the quote, if it is quoted.
    quoted
        Whether it stands in quotes: only bare text can mean ``true`` or nothing at all.
    """

    text: str
    mark: Mark
    quoted: bool

    @property
    def inside(self) -> Mark:
        """Where the text itself begins."""
        return self.mark.right(1) if self.quoted else self.mark

    @property
    def empty(self) -> bool:
        """Whether it says nothing: no text, or one of YAML's words for null."""
        return not self.text.strip() or (not self.quoted and self.text in {"~", "null", "Null", "NULL"})


@dataclass(frozen=True, slots=True)
class Items:
    """A YAML sequence."""

    nodes: tuple[Node, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Table:
    """A YAML mapping, its keys in order and each there once."""

    entries: tuple[tuple[Scalar, Node], ...]
    mark: Mark


Node: TypeAlias = "Scalar | Items | Table"


def json_value(node: Node) -> object:
    """Returns a node as JSON has it: bare ``true``, ``null`` and numbers as such, all other text as text."""
    if isinstance(node, Table):
        return {key.text: json_value(value) for key, value in node.entries}
    if isinstance(node, Items):
        return [json_value(item) for item in node.nodes]
    if node.quoted:
        return node.text
    if node.empty:
        return None
    try:
        value = json.loads(node.text, parse_constant=_no_number)
    except ValueError:
        return node.text
    return value if isinstance(value, bool | int | float) else node.text


def _no_number(text: str) -> object:
    raise ValueError(text)
