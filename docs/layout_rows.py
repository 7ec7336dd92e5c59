"""The table of layouts in the guide, from the one that `init` recognises by."""

from __future__ import annotations

from docs.markdown import code, link, table
from docs.preset_pages import file_name
from shardmerge.recognition.table import Layout, layout_table

_MOST_NAMES = 2


def layout_rows() -> list[str]:
    """Returns the lines of the table."""
    head = ("you have", "names such as", "`model_type`", "from there")
    return table(head, [_row(one) for one in layout_table().layouts])


def _row(one: Layout) -> tuple[str, ...]:
    names = ", ".join(code(min(tensor.names, key=len)) for tensor in one.has[:_MOST_NAMES])
    types = ", ".join(one.model_types)
    return one.name.replace("|", "&#124;"), names, types, _ways(one)


def _ways(one: Layout) -> str:
    roads = [link(f"`{road.preset}`", f"../presets/{file_name(road.preset)}") for road in one.roads]
    merged = ["[`adapters:`](adapters.md)"] if one.adapter is not None else []
    return ", ".join([*merged, *roads]) or "its own names"
