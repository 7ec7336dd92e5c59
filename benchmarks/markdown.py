"""Tables and figures as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

MIB = 1 << 20


def table(columns: Sequence[object], rows: Iterable[Sequence[object]], *, words: int = 1) -> list[str]:
    """Returns the lines of a table, an empty one behind; the first ``words`` columns are words, the rest figures."""
    marks = ["---" if index < words else "---:" for index in range(len(columns))]
    return [row(columns), row(marks), *(row(cells) for cells in rows), ""]


def row(cells: Iterable[object]) -> str:
    """Returns one line of a table."""
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "\\|")


def spread(found: Mapping[str, float], unit: float = 1, digits: int = 2) -> str:
    """Returns the median and, in brackets, the smallest and the largest."""
    if not found:
        return ""
    median, low, high = (f"{found[name] / unit:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def megabytes(found: Mapping[str, float] | None) -> str:
    """Returns the median in MB of a million bytes."""
    return f"{found['median'] / 1e6:,.0f}" if found else ""


def mebibytes(found: Mapping[str, float] | None) -> str:
    """Returns the median in MiB."""
    return f"{found['median'] / MIB:,.0f}" if found else ""
