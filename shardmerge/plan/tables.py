"""A table as a value, and as plain text of whatever width it takes; sizes as people read them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.errors import escaped


@dataclass(frozen=True, slots=True)
class TextTable:
    """Rows below a head.

    Attributes
    ----------
    head
        The title of each column.
    rows
        A cell a column.
    right
        Columns of numbers, which end below each other.
    """

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Names of tensors are among the cells, and may hold anything."""
        object.__setattr__(self, "rows", [tuple(map(escaped, row)) for row in self.rows])

    def lines(self) -> list[str]:
        """Returns a line a row, columns two blanks apart, none at the end of a line."""
        widths = [max(map(len, cells)) for cells in zip(self.head, *self.rows, strict=True)]
        return [self._line(row, widths) for row in (self.head, *self.rows)]

    def _line(self, row: tuple[str, ...], widths: Sequence[int]) -> str:
        cells = (
            cell.rjust(width) if column in self.right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    def __str__(self) -> str:
        return "\n".join(self.lines())


# What a command shows: paragraphs and tables.
Block: TypeAlias = str | TextTable


def human_bytes(count: int) -> str:
    """Returns bytes in decimal units, as disks and the ecosystem count them: ``16.71 GB``."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def counted(count: int, what: str) -> str:
    """Returns a number of things: ``1 file``, ``45,395 tensors``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
