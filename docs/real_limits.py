"""The table of full disks and limits in docs/reliability.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.markdown import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "soak" / "limits.json"


def real_limits() -> list[str]:
    """Returns the lines of the table: by limit, how many values were tried, and what the runs came to."""
    read = json.loads(RESULTS.read_text("utf-8"))
    rows = [_row(name, one) for name, one in read["limits"].items()]
    head = ("limit", "values", "succeeded", "ended with an error", "wrong")
    size = f"a result of {read['bytes'] / 1e6:.1f} MB"
    said = f"Measured on {read['date']}, Linux {read['kernel']}, with {size}, by `python -m tests.real_limits`."
    return [said, "", *table(head, rows)]


def _row(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    outcomes, wrong = one["outcomes"], len(one["wrong"])
    ended = {text.split(" ", 2)[2]: count for text, count in outcomes.items() if text != "exit 0"}
    codes = ", ".join(f"`{code}` {count}" for code, count in sorted(ended.items()))
    values = sum(outcomes.values()) + wrong
    return name, str(values), str(outcomes.get("exit 0", 0)), codes, str(wrong)
