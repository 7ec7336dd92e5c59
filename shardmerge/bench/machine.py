"""The machine card: what a reader must know of a machine to judge its figures."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from shardmerge.storage.reading import file_system

_GIB = 1 << 30


def machine_card(folder: Path) -> dict[str, object]:
    """Returns the card: processor, memory (GiB), kernel, the file system of ``folder``, versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / _GIB, 1),
        "kernel": platform.release().split("-")[0],
        "file_system": file_system(folder),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "ml_dtypes", "safetensors")},
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
