"""The machine card and the provenance of a result."""

from __future__ import annotations

import compileall
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from shardmerge.bench.machine import machine_card as card_of

ROOT = Path(__file__).parent.parent
SCHEMA = 2


def machine_card(folder: Path, others: Mapping[str, str] | None = None, note: str = "") -> dict[str, object]:
    """Returns what a reader must know of the machine to judge the figures; ``others`` are versions of peers."""
    return {**card_of(folder), "torch": version("torch"), **(others or {}), "note": note}


def as_installed() -> None:
    """Compiles our modules, as pip does: a source tree may not be, which costs every start half a second."""
    compileall.compile_dir(ROOT / "shardmerge", quiet=1)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if not done.returncode else ""


def provenance() -> dict[str, object]:
    """Returns what code was measured, and when."""
    return {
        "schema": SCHEMA,
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": bool(_git("status", "--porcelain", "--", "shardmerge")),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
