"""Memory control groups: how much a process and its page cache took together, and a limit on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A group of its own.

    Attributes
    ----------
    procs
        The file that a process writes its id to, to join.
    peak_file
        Says the most bytes that the group ever had: memory of processes, pages that they brought into the page cache
        or wrote, and what the kernel needed for them.
    """

    procs: str
    peak_file: Path

    def peak(self) -> int:
        """Returns bytes."""
        return int(self.peak_file.read_text("ascii"))


@contextmanager
def memory_group(limit: int = 0) -> Iterator[MemoryGroup | None]:
    """Makes a group below our own, with a limit in bytes if there is one; None where nobody lets us."""
    made = _make(limit)
    if made is None:
        yield None
        return
    folder, peak = made
    try:
        yield MemoryGroup(str(folder / "cgroup.procs"), folder / peak)
    finally:
        folder.rmdir()


def _make(limit: int) -> tuple[Path, str] | None:
    for parent, limit_file, peak in _parents():
        folder = parent / f"shardmerge-bench-{token_hex(4)}"  # process ids are those of a namespace
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if limit:
                (folder / limit_file).write_text(str(limit), "ascii")
            (folder / peak).read_text("ascii")
        except OSError:
            folder.rmdir()
            continue
        return folder, peak
    return None


def _parents() -> Iterator[tuple[Path, str, str]]:
    """Yields where a group may be made, its limit and its peak: v1, v2 below ours, v2 beside ours."""
    for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            parent = Path("/sys/fs/cgroup/memory") / path.lstrip("/")
            yield parent, "memory.limit_in_bytes", "memory.max_usage_in_bytes"
        elif not controllers:
            own = Path("/sys/fs/cgroup") / path.lstrip("/")
            yield own, "memory.max", "memory.peak"
            if path != "/":  # v2 gives controllers to children only where no process stands in the parent itself
                yield own.parent, "memory.max", "memory.peak"
