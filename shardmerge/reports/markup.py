"""HTML as text: what is not ours is escaped here, and nowhere else."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterable, Sequence

# Characters that show nothing, break lines or turn the direction of writing: a name with them would look like another.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(value: object) -> str:
    r"""Returns a text in which characters that cannot be seen are spelt out: ``\u202e``."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"\\u{ord(one):04x}" if unicodedata.category(one) in _UNSEEN else one for one in text)


def escaped(value: object) -> str:
    """Returns a text for use in an element or in a quoted attribute."""
    return html.escape(visible(value))


def json_block(value: object) -> str:
    """Returns a value as JSON for a ``script`` element, which nothing in it can end."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def code(value: object) -> str:
    """Returns a name or path in the type of code; lines may break behind its dots and slashes."""
    text = escaped(value)
    return f"<code>{text.replace('.', '.<wbr>').replace('/', '/<wbr>')}</code>"


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str,
    numbers: Sequence[int] = (),
    short: Sequence[int] = (),
) -> str:
    """Returns a table.

    Parameters
    ----------
    heads
        Texts of the head, escaped.
    rows
        HTML of each cell. The first cell is the head of its row.
    caption
        What screen readers say the table is, escaped.
    numbers, short
        Which columns are numbers, and stand on the right; and which others are never broken.
    """
    kinds = {**dict.fromkeys(short, ' class="s"'), **dict.fromkeys(numbers, ' class="n"')}
    marks = [kinds.get(column, "") for column in range(len(heads))]
    head = "".join(f'<th scope="col"{mark}>{text}</th>' for text, mark in zip(heads, marks, strict=True))
    body = "\n".join(f"<tr>{_cells(row, heads, marks)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption class="unseen">{caption}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cells(row: Sequence[str], heads: Sequence[str], marks: Sequence[str]) -> str:
    first = f'<th scope="row">{row[0]}</th>'
    rest = zip(row[1:], heads[1:], marks[1:], strict=True)
    return first + "".join(f'<td data-head="{head}"{mark}>{cell}</td>' for cell, head, mark in rest)
