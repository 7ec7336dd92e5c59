"""The table of docs/reliability.md: what every error of the system, at every call, came to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from docs.markdown import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "soak" / "errors.json"


def error_outcomes() -> list[str]:
    """Returns the lines of the tables, and the counts and date above them."""
    read = json.loads(RESULTS.read_text("utf-8"))
    fixtures: Mapping[str, Mapping[str, int]] = read["fixtures"]
    rows: list[Mapping[str, Any]] = read["rows"]
    head = ("fixture", "calls of a run", "faults", "tried", "wrong")
    counts = [
        (name, f"{one['calls']:,}", f"{one['faults']:,}", f"{one['tried']:,}", str(one["wrong"]))
        for name, one in fixtures.items()
    ]
    said = f"Measured on {read['date']}, Linux {read['kernel']}, by `python -m tests.every_error`."
    return [said, "", *table(head, counts), "", *_by_call(rows)]


def _by_call(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    cells: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        exit_code = row["outcome"].split()[1]
        cells.setdefault((row["call"], row["error"]), Counter())[exit_code] += row["count"]
    errors = sorted({error for _, error in cells})
    lines = [
        (call, *(_cell(cells.get((call, error), Counter())) for error in errors))
        for call in sorted({call for call, _ in cells})
    ]
    return table(("call", *errors), lines)


def _cell(found: Counter[str]) -> str:
    return ", ".join(f"{exit_code}: {count}" for exit_code, count in sorted(found.items()))
