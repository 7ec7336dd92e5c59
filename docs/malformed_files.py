"""The table of malformed files in docs/reliability.md."""

from __future__ import annotations

import json
from pathlib import Path

from docs.markdown import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "soak" / "corpus.json"


def malformed_files() -> list[str]:
    """Returns the lines of the table: by kind, how many files there are, and how many were refused."""
    read = json.loads(RESULTS.read_text("utf-8"))
    rows = [(kind, *(str(row[name]) for name in ("files", "refused", "read"))) for kind, row in read["kinds"].items()]
    most = f"{read['seconds_longest']} s of CPU time and {read['mebibytes_most']} MiB"
    said = f"Measured on {read['date']}. The most that one file took was {most}."
    return [said, "", *table(("kind", "files", "refused", "read"), rows)]
