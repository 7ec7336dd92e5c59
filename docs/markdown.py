"""Pieces of Markdown for the generated pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table."""
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def link(text: str, path: str) -> str:
    """Returns a link."""
    return f"[{text}]({path})"


def code(text: str) -> str:
    """Returns text as code that may stand in a table: a bar would end its cell, backticks or not."""
    if not set(text) & set("|<>&"):
        return f"`{text}`"
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return f"<code>{escaped}</code>"
