"""What the long tests share: a machine in memory, and a result file of rows."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import shardmerge as sm
from tests.faults import tool
from tests.killing import Machine, machine


@contextmanager
def machine_in_memory(name: str) -> Iterator[tuple[Path, Machine]]:
    """Gives a directory in memory, and what runs commands there; removes it."""
    base = Path(tempfile.mkdtemp(prefix=f"shardmerge-{name}-", dir="/dev/shm"))
    try:
        with machine(base, tool("gcc")) as runs:
            yield base, runs
    finally:
        shutil.rmtree(base)


def write_rows(path: Path, rows: Sequence[object]) -> None:
    """Writes a result file."""
    value = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "kernel": os.uname().release,
        "shardmerge": sm.__version__,
        "rows": rows,
    }
    path.write_text(json.dumps(value, indent=1) + "\n")
