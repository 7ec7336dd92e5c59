"""What the system lets this process use: memory and CPUs, cgroups included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# What a user who says nothing allows: a login node's leftovers, and for many CPUs what a process on each needs.
DEFAULT_BUDGET = 256 << 20
_PER_WORKER = 32 << 20


def default_budget(workers: int) -> int:
    """Returns 256 MiB, more for more than eight workers, or what cgroup or Slurm grant if that is less, in bytes."""
    wanted = max(DEFAULT_BUDGET, workers * _PER_WORKER)
    return min([wanted, *(limit for limit in (cgroup_limit(), _slurm_memory()) if limit)])


def default_workers() -> int:
    """Returns the CPUs this process may use, at least 2: one writes while the other computes."""
    return max(2, usable_cpus())


def _slurm_memory() -> int | None:
    """Returns what Slurm granted on this node, in bytes: ``--mem``, or ``--mem-per-cpu`` times the CPUs."""
    node, cpu = (os.environ.get(f"SLURM_MEM_PER_{each}", "") for each in ("NODE", "CPU"))  # in MiB
    if node.isdigit() and int(node):
        return int(node) << 20
    return int(cpu) * usable_cpus() << 20 if cpu.isdigit() and int(cpu) else None


def usable_cpus() -> int:
    """Returns the least of affinity, the cgroup's quota, and what Slurm granted (``--cpus-per-task`` may not bind)."""
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    counts = [len(os.sched_getaffinity(0)), *_quotas(), *([int(granted)] if granted.isdigit() else [])]
    return max(1, min(counts))


def may_fork() -> bool:
    """Tells whether this process has one thread and no more: another could hold a lock that a copy would wait for.

    Where /proc does not tell, it has several.
    """
    try:
        return len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208  # names are all that is wanted
    except OSError:
        return False


def bounds_cache(moved: int) -> bool:
    """Tells whether files must not gather in the page cache: all that is read and written exceeds the memory.

    That of the cgroup, or of the machine. The system would reclaim pages at the limit, one writer after the other, and
    throw out what others use: a whole 8B took 71 s so, and 46 s in a cgroup of 128 MiB, where its pages left at once.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return moved > min(cgroup_limit() or physical, physical)


def family_bytes() -> int:
    """Returns the resident memory of this process and its children; pages that they share with it count once.

    0 where /proc does not tell.
    """
    pages = (_text(Path("/proc/self/statm")) or "0 0").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") + sum(map(_own_bytes, _children()))


def _children() -> Iterator[int]:
    """Yields the ids of this process's children; none where the kernel does not tell (CONFIG_PROC_CHILDREN)."""
    for task in _listed("/proc/self/task"):
        yield from map(int, _text(Path("/proc/self/task", task, "children")).split())


def _own_bytes(pid: int) -> int:
    """Returns the memory that a process shares with no other; 0 for one that has ended."""
    lines = (line.split() for line in _text(Path(f"/proc/{pid}/smaps_rollup")).splitlines())
    return sum(int(line[1]) << 10 for line in lines if line[0] in ("Private_Clean:", "Private_Dirty:"))


def cgroup_limit() -> int | None:
    """Returns the memory limit of this process's cgroup (v1 or v2) in bytes, or None where there is none."""
    limits = [_read_limit(path) for path in _limit_files()]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit_files() -> list[Path]:
    v2 = [folder / "memory.max" for folder in _groups("")]
    return v2 + [folder / "memory.limit_in_bytes" for folder in _groups("memory")]


def _quotas() -> Iterator[int]:
    """Yields how many CPUs' time the cgroups grant, rounded up."""
    for folder in _groups(""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield -(-int(quota) // int(period))
    for folder in _groups("cpu"):
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # v1 writes -1 for no quota
            yield -(-int(quota) // int(period))


def _groups(controller: str) -> Iterator[Path]:
    """Yields the cgroup of this process and all above it, whose limits hold as well; "" is the one hierarchy of v2."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = Path("/sys/fs/cgroup") / controller
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if root in (folder, *folder.parents))


def _read_limit(path: Path) -> int | None:
    text = _text(path)
    # v2 writes "max", v1 a number near 2**63, for no limit.
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  # names are all that is wanted
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""


# glibc's mallopt parameter for the size from which memory is mapped (malloc.h), and a size below any tile.
_M_MMAP_THRESHOLD = -3
_MAPPED_FROM = 128 << 10


def return_freed_memory() -> None:
    """Makes the allocator give large buffers back to the system when they are freed.

    glibc raises its threshold to 32 MiB with the first large buffer that is freed, and keeps what it then takes from
    the heap: the measured peak of a run would depend on the order of sizes. Elsewhere (musl, macOS) nothing is done.
    """
    import ctypes  # only a run makes buffers

    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
    except (OSError, AttributeError):
        return
