"""Receipts that were edited, and whose digest was made anew: what somebody does on purpose, or another tool."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

RECEIPT = "shardmerge.json"


def receipt_of(folder: Path) -> dict[str, Any]:
    """Returns the receipt of a result."""
    found: dict[str, Any] = json.loads((folder / RECEIPT).read_text("utf-8"))
    return found


def write_receipt(folder: Path, value: dict[str, Any]) -> None:
    """Writes a receipt with the digest of its lines."""
    lines = json.dumps({**value, "sha256": ""}, indent=1, sort_keys=True).splitlines(keepends=True)
    rest = "".join(line for line in lines if not line.startswith(' "sha256": '))
    digest = hashlib.sha256(rest.encode()).hexdigest()
    sealed = "".join(f' "sha256": "{digest}",\n' if line.startswith(' "sha256": ') else line for line in lines)
    (folder / RECEIPT).write_text(sealed, "utf-8")
