"""The tables of fuzzing and of the comparison with other readers in docs/reliability.md."""

from __future__ import annotations

import json
from pathlib import Path

from docs.markdown import table

_OUTCOMES = ("equal", "refused by both", "refused by shardmerge", "refused by the other", "different")
SOAK = Path(__file__).resolve().parent.parent / "tests" / "soak"


def fuzzing() -> list[str]:
    """Returns the lines of the table: by reader, how many inputs it was given, and what came of them."""
    read = json.loads((SOAK / "fuzz.json").read_text("utf-8"))
    rows = [
        (row["about"], f"{row['executions']:,}", str(row["edges"]), str(row["most_bytes"]), str(len(row["findings"])))
        for row in read["targets"].values()
    ]
    total = sum(row["executions"] for row in read["targets"].values())
    said = f"Measured on {read['date']}, Linux {read['kernel']}, Python {read['python']}, by `python -m tests.fuzz`."
    head = ("what is read", "inputs", "edges covered", "longest input in bytes", "findings")
    return [f"{said} {total:,} inputs in all.", "", *table(head, rows)]


def differential() -> list[str]:
    """Returns the lines of the table: by format, sound and broken files, what the two readers made of them."""
    read = json.loads((SOAK / "differential.json").read_text("utf-8"))
    rows = [
        (f"{kind}, {state}", *(f"{row[state].get(outcome, 0):,}" for outcome in _OUTCOMES))
        for kind, row in read["kinds"].items()
        for state in ("sound", "broken")
    ]
    files = " and ".join(f"{row['files']:,} of {kind}" for kind, row in read["kinds"].items())
    said = f"Measured on {read['date']}, Linux {read['kernel']}, by `python -m tests.differential`: {files}."
    return [said, "", *table(("files", *_OUTCOMES), rows)]
