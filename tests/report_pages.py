"""A report as a reader without a browser sees it: its tables, by the heading above them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.conftest import GOLDEN, shardmerge

XTUNER = GOLDEN / "xtuner"
# A LLaVA whose encoder was frozen, with a vocabulary that is to grow: 298 rows become 320.
MAPPING = f"""\
shardmerge: 1
sources:
  trained: {XTUNER}/frozen_z2/work_dirs/iter_2.pth
  llm: {XTUNER}/base_llm
  vision: {XTUNER}/base_clip
output: {{path: out, dtype: bfloat16}}
use: xtuner/llava-to-hf
"""


def reported(folder: Path) -> Path:
    """Makes the LLaVA in ``out`` below a folder, with the report of the run beside it; returns the report."""
    (folder / "mapping.yaml").write_text(MAPPING, "utf-8")
    shardmerge("run", folder / "mapping.yaml", "--no-sync", "--report")
    return folder / "out.report.html"


class ReportPage(HTMLParser):
    """The page taken apart.

    Attributes
    ----------
    tables
        Rows of each table, as texts of their cells, by its caption.
    text
        All text that is shown.
    data
        What the page's script is given.
    tags
        Names of all elements.
    urls
        Everything that a browser could be told to fetch.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: set[str] = set()
        self.urls: list[str] = []
        self.text, self._caption, self._json = "", "", ""
        self._rows: list[list[str]] = []
        self._inside: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.close()
        self.data: dict[str, Any] = json.loads(self._json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "poster")]
        if tag not in ("meta", "link", "wbr", "br", "input"):
            self._inside.append(tag if dict(attrs).get("type") != "application/json" else "json")
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()
        if tag == "table":
            self.tables[self._caption] = self._rows[1:]

    def handle_data(self, data: str) -> None:
        if "json" in self._inside:
            self._json += data
        elif "caption" in self._inside:
            self._caption += data
        elif "script" not in self._inside and "style" not in self._inside:
            self.text += data
            if {"td", "th"} & set(self._inside):
                self._rows[-1][-1] += data

    @property
    def tensors(self) -> list[list[str]]:
        """The rows of the table of tensors."""
        return self.tables["Tensors of the result"]
