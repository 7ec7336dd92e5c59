"""Writes reference/mapping.schema.json and preset.schema.json: `python docs/write_schema.py`."""

from __future__ import annotations

import json
from pathlib import Path

from shardmerge.api import schema

REFERENCE = Path(__file__).parent / "reference"


def main() -> None:
    for name in ("mapping", "preset"):
        text = json.dumps(schema(preset=name == "preset"), indent=1, ensure_ascii=False)
        (REFERENCE / f"{name}.schema.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
