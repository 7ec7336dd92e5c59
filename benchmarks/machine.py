"""The machine card and the provenance of a result."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness import answer, measure
from benchmarks.peers import environment
from shardmerge.storage.reading import file_system

ROOT = Path(__file__).parent.parent
SCHEMA = 1
_GIB = 1 << 30


def machine_card(folder: Path, deepspeed: Path | None, note: str) -> dict[str, object]:
    """Returns what a reader must know of the machine to judge the figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / _GIB, 1),
        "kernel": platform.release().split("-")[0],
        "file_system": file_system(folder),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "ml_dtypes", "safetensors", "torch")},
        "note": note,
    }
    return card | ({"deepspeed": environment.VERSION, **_versions_there(deepspeed)} if deepspeed else {})


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions_there(python: Path) -> dict[str, str]:
    program = (
        "from importlib.metadata import version\n"
        "import json, platform\n"
        "print(json.dumps({'deepspeed_python': platform.python_version(),"
        " 'deepspeed': version('deepspeed'), 'deepspeed_torch': version('torch')}))"
    )
    return {key: str(value) for key, value in answer(measure([python, "-c", program])).items()}


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
