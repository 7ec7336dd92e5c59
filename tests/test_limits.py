"""What the system allows: CPUs and memory, asked of real control groups, and the page cache kept within them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import shardmerge
from shardmerge.publish import having_made
from shardmerge.storage import cache, limits
from tests.faults import tool

CPUS = "from shardmerge.storage.limits import usable_cpus; print(usable_cpus())"
JOINING = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); "


def said(program: str, *arguments: object, env: dict[str, str] | None = None) -> str:
    """Runs a program and returns what it printed."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **(env or {})}
    ).stdout.strip()


def test_cpus_are_those_of_the_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    assert said(f"import os; os.sched_setaffinity(0, {{{one}}}); {CPUS}") == "1"
    assert said(CPUS) == str(len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("quota", "cpus"), [("150000", [2]), ("200000", [2]), ("50000", [1]), ("-1", []), ("max", [])])
def test_a_quota_is_rounded_up(
    version: int, quota: str, cpus: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_groups", lambda controller: iter([tmp_path / controller]))
    (tmp_path / "cpu").mkdir()
    if version == 2:
        (tmp_path / "cpu.max").write_text(f"{quota} 100000")
    else:
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert list(limits._quotas()) == cpus


@pytest.mark.parametrize(
    ("granted", "nbytes"),
    [
        ({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_PER_TASK": "1"}, 512 << 20),
        ({"SLURM_MEM_PER_NODE": "3"}, 3 << 20),
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": "0"}, None),  # all that the node has
        ({"SLURM_MEM_PER_CPU": "2G"}, None),
        ({}, None),
    ],
)
def test_what_slurm_grants_is_in_mebibytes(
    granted: dict[str, str], nbytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in granted.items():
        monkeypatch.setenv(name, value)
    assert limits._slurm_memory() == nbytes


def test_memory_that_is_shared_is_not_of_its_own() -> None:
    before = limits._own_bytes(os.getpid())
    mine = bytearray(os.urandom(1)) * (64 << 20)
    grown = limits._own_bytes(os.getpid()) - before
    assert 60 << 20 < grown < 80 << 20
    assert mine
    assert limits._own_bytes(1 << 22) == 0  # no process has such a number


def test_slurm_may_grant_fewer_and_never_more() -> None:
    assert said(CPUS, env={"SLURM_CPUS_PER_TASK": "1"}) == "1"
    assert said(CPUS, env={"SLURM_CPUS_PER_TASK": "4096"}) == str(len(os.sched_getaffinity(0)))
    assert said(CPUS, env={"SLURM_CPUS_PER_TASK": "2(x3)"}) == str(len(os.sched_getaffinity(0)))


@pytest.fixture
def half_a_cpu() -> Iterator[Path]:
    """The ``cgroup.procs`` of a group, and of one inside it, that may use half a CPU."""
    reasons = []
    for root, name, text in (
        (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", "50000"),
        (Path("/sys/fs/cgroup"), "cpu.max", "50000 100000"),
    ):
        outer = root / f"shardmerge-cpu-{os.getpid()}"
        try:
            outer.mkdir()
        except OSError as error:
            reasons.append(f"{root}: {error.strerror}")
            continue
        try:
            (outer / name).write_text(text)
            inner = outer / "inner"
            inner.mkdir()
        except OSError as error:
            outer.rmdir()
            reasons.append(f"{outer}: {error.strerror}")
            continue
        yield inner / "cgroup.procs"
        inner.rmdir()
        outer.rmdir()
        return
    pytest.skip("no CPU cgroup can be made here: " + "; ".join(reasons))


def test_a_quota_counts_wherever_above_it_stands(half_a_cpu: Path) -> None:
    assert said(JOINING + CPUS, half_a_cpu) == "1"


def test_a_cache_is_bounded_where_the_memory_is_smaller_than_what_moves() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert limits.bounds_cache(physical + 1)
    assert not limits.bounds_cache(min(physical, limits.cgroup_limit() or physical))


def test_what_is_bounded_leaves_the_page_cache(disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of what was written, but for what is looked at again: 16 blocks, and what is read ahead of them."""
    monkeypatch.setattr(having_made, "bounds_cache", lambda moved: True)
    folder = disk("ext4") / "bounded"
    folder.mkdir()
    save_file({f"w{i}": np.ones(4 << 20, np.uint8) for i in range(16)}, folder / "model.safetensors")
    subprocess.run(["sync", "-f", str(folder)], check=True)
    shardmerge.convert(folder / "model.safetensors", folder / "out")
    command = [tool("fincore"), "--bytes", "--noheadings", "--output", "RES", str(folder / "out/model.safetensors")]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 8 << 20


BOUNDED = """
import sys
import shardmerge
from shardmerge.publish import having_made
having_made.bounds_cache = lambda moved: True
shardmerge.convert(sys.argv[1], sys.argv[2])
"""


def test_what_leaves_the_page_cache_was_waited_for(tmp_path: Path) -> None:
    """Every range: where the disk is slow its pages are still dirty, and stay whatever is advised."""
    save_file({f"w{i}": np.ones(1 << 20, np.uint8) for i in range(8)}, tmp_path / "model.safetensors")
    command = [
        tool("strace"),
        "-ff",
        "-o",
        str(tmp_path / "log"),
        "-e",
        "trace=sync_file_range",
        sys.executable,
        "-c",
        BOUNDED,
    ]
    subprocess.run([*command, str(tmp_path / "model.safetensors"), str(tmp_path / "out")], check=True)
    said = "".join(path.read_text() for path in tmp_path.glob("log.*"))  # of a thread each: no line is cut in two
    flags = re.findall(r"sync_file_range\(\d+, (\d+, \d+), (\S+)\)", said)
    begun = {place for place, flag in flags if flag == "SYNC_FILE_RANGE_WRITE"}
    assert len(begun) == 8 + 1  # and the header
    assert begun == {place for place, flag in flags if "WAIT_BEFORE" in flag and "WAIT_AFTER" in flag}


def test_a_thread_that_finds_nothing_behind_the_cursor_goes_on() -> None:
    """Another one took what there was, and has not counted it yet."""
    trail, dropped = cache.Trail(), list[str]()

    class Taken(int):
        def __rsub__(self, other: int) -> int:
            trail.passed(1, lambda: dropped.append("of the second"))
            return other - int(self)

    trail.passed(Taken(1 << 30), lambda: dropped.append("of the first"))
    assert dropped == ["of the second", "of the first"]
