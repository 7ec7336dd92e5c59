"""The table of flipped bits in docs/reliability.md."""

from __future__ import annotations

import json
from pathlib import Path

from docs.markdown import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "soak" / "bit-flips.json"


def bit_flips() -> list[str]:
    """Returns the lines of the table: by format and file, how many bits were flipped, and how many were not seen."""
    read = json.loads(RESULTS.read_text("utf-8"))
    rows = [
        (form, what, *(f"{found[name]:,}" for name in ("flips", "unseen", "unnamed", "bugs")))
        for form, files in read["formats"].items()
        for what, found in files.items()
    ]
    head = ("format", "file", "bits flipped", "not noticed", "file not named", "exit 70")
    return [f"Measured on {read['date']}, by `python -m tests.bit_flips --flips 5000`.", "", *table(head, rows)]
