"""The result files of the long tests, which docs/reliability.md shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SOAK = Path(__file__).resolve().parent.parent / "tests" / "soak"


def read(name: str) -> dict[str, Any]:
    """Returns a result file."""
    value: dict[str, Any] = json.loads((_SOAK / f"{name}.json").read_text("utf-8"))
    return value


def measured(result: Mapping[str, Any], module: str) -> str:
    """Returns when, where and by what it was measured."""
    return f"Measured on {result['date']}, Linux {result['kernel']}, by `python -m tests.{module}`"
