"""Tables on stdout: as wide as they are in a pipe or a file, no wider than the screen in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from shardmerge.cli import colour
from shardmerge.plan.tables import Table


def show(blocks: Iterable[str | Table]) -> None:
    """Writes texts and tables to stdout, an empty line between them."""
    for number, block in enumerate(blocks):
        if number:
            colour.echo("")
        if isinstance(block, Table):
            show_table(block)
        else:
            colour.echo(block)


def show_table(table: Table) -> None:
    """Writes a table to stdout; in a terminal that is too narrow, cells are broken and columns are not."""
    lines = table.lines()
    columns = _columns()
    if columns and max(map(len, lines)) > columns:
        _fitted(table, columns)
    else:
        colour.echo("\n".join([colour.bold(lines[0]), *lines[1:]]))


def _columns() -> int:
    """Returns how wide the terminal is that stdout is, or 0 where it is none."""
    if not sys.stdout.isatty():
        return 0
    import shutil

    return shutil.get_terminal_size().columns


def _fitted(table: Table, columns: int) -> None:
    from rich.console import Console
    from rich.table import Table as Fitted
    from rich.text import Text

    coloured = colour.has_colour(sys.stdout)
    fitted = Fitted(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold" if coloured else "")
    for number, title in enumerate(table.head):
        right = number in table.right
        fitted.add_column(title, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in table.rows:
        fitted.add_row(*map(Text, row))  # text and no markup: names have brackets
    screen = Console(
        file=sys.stdout, width=columns, force_terminal=coloured, color_system="standard" if coloured else None
    )
    screen.print(fitted)
