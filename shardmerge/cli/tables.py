"""Texts and tables on stdout: as wide as they are in a pipe or a file, no wider than the screen in a terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from shardmerge.cli import colour
from shardmerge.plan.tables import Block, TextTable

# Blanks between columns.
_GAP = 2


def show(blocks: Iterable[Block]) -> None:
    """Writes texts and tables to stdout, an empty line between them."""
    for number, block in enumerate(blocks):
        if number:
            colour.echo("")
        if isinstance(block, TextTable):
            show_table(block)
        else:
            write(block)


def write(text: str) -> None:
    """Writes text to stdout; in a terminal, lines that are too long are broken at blanks."""
    colour.echo(_wrapped(text))


def show_table(table: TextTable) -> None:
    """Writes a table to stdout; in a terminal that is too narrow, cells are broken and columns are not."""
    lines, columns = table.lines(), colour.columns()
    if columns and max(map(len, lines)) > columns:
        _fitted(table, columns)
    else:
        colour.echo("\n".join([colour.bold(lines[0]), *lines[1:]]))


def _wrapped(text: str) -> str:
    """Breaks lines at blanks where a terminal would break them anywhere."""
    columns = colour.columns()
    return "\n".join(_broken(line, columns) for line in text.split("\n")) if columns else text


def _broken(line: str, columns: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def _fitted(table: TextTable, columns: int) -> None:
    from rich.console import Console
    from rich.table import Table as Fitted
    from rich.text import Text

    coloured = colour.has_colour(sys.stdout)
    fitted = Fitted(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold" if coloured else "")
    for number, (title, width) in enumerate(zip(table.head, _widths(table, columns), strict=True)):
        fitted.add_column(title, justify="right" if number in table.right else "left", width=width, overflow="fold")
    for row in _not_repeated(table.rows):
        fitted.add_row(*map(Text, row))  # text and no markup: names have brackets
    screen = Console(
        file=sys.stdout, width=columns, force_terminal=coloured, color_system="standard" if coloured else None
    )
    screen.print(fitted)


def _widths(table: TextTable, columns: int) -> list[int]:
    """Returns widths that fit: the widest column of text gives way first, down to its longest word if it is short."""
    cells = list(zip(table.head, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in cells]
    least = [min(max(map(len, " ".join(column).split())), columns // 3) for column in cells]
    room = columns - _GAP * (len(widths) - 1)
    for floor in (least, [1] * len(widths)):
        while sum(widths) > room:
            loose = [n for n, width in enumerate(widths) if n not in table.right and width > floor[n]]
            if not loose:
                break
            widths[max(loose, key=widths.__getitem__)] -= 1
    return widths


def _not_repeated(rows: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yields rows without a first cell that is that of the row above: it would take lines."""
    above = None
    for first, *others in rows:
        yield ("" if first == above else first, *others)
        above = first
