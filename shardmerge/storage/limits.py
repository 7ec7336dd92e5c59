"""What the system lets this process use: memory and CPUs, cgroups included."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# What a user who says nothing allows: a login node's leftovers.
DEFAULT_BUDGET = 256 << 20

# Each worker costs two tiles of memory; with more the default would no longer fit a small cgroup beside the rest.
_MOST_WORKERS = 4


def default_budget() -> int:
    """Returns 256 MiB, or what the memory cgroup allows if that is less, in bytes."""
    return min(DEFAULT_BUDGET, cgroup_limit() or DEFAULT_BUDGET)


def default_workers() -> int:
    """Returns the CPUs this process may run on (affinity, so Slurm's binding counts), at least 2 and at most 4."""
    return max(2, min(_MOST_WORKERS, len(os.sched_getaffinity(0))))


def resident_bytes() -> int:
    """Returns the resident memory of this process, or 0 where /proc does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def cgroup_limit() -> int | None:
    """Returns the memory limit of this process's cgroup (v1 or v2) in bytes, or None where there is none."""
    limits = [_read_limit(path) for path in _limit_files()]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit_files() -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append(Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.max")
        elif "memory" in controllers.split(","):
            found.append(Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.limit_in_bytes")
    return found


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text("utf-8").strip()
    except OSError:
        return None
    # v2 writes "max", v1 a number near 2**63, for no limit.
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


# glibc's mallopt parameter for the size from which memory is mapped (malloc.h), and a size below any tile.
_M_MMAP_THRESHOLD = -3
_MAPPED_FROM = 128 << 10


def return_freed_memory() -> None:
    """Makes the allocator give large buffers back to the system when they are freed.

    glibc raises its threshold to 32 MiB with the first large buffer that is freed, and keeps what it then takes from
    the heap: the measured peak of a run would depend on the order of sizes. Elsewhere (musl, macOS) nothing is done.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
    except (OSError, AttributeError):
        return
