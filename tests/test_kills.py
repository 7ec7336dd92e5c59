"""A run that is killed at any call that changes a file: nothing partial is seen, and the same command goes on."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import tool
from tests.killing import FAIL, HALF, KILL, KILL_ALL, Machine, Trap
from tests.kills import kill_and_go_on
from tests.scene import RECEIPT, WAYS, Scene
from tests.syncs import points

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a directory of another owner takes root")


def test_killed_at_every_step(scene: Scene, runs: Machine) -> None:
    """Between two writes to one file nothing changes for the next run; `python -m tests.kills` kills there too."""
    scene.begin(WAYS["plain"])
    assert scene.run(runs, WAYS["plain"]).code == 0
    steps = points(runs.calls)
    assert len(steps) > 60
    for at in steps:
        assert not kill_and_go_on(scene, runs, WAYS["plain"], Trap(KILL, at=at))
    scene.untouched()


@pytest.mark.parametrize("way", ["overwrite", "no-exchange", "empty"])
def test_killed_at_every_call_from_the_receipt_on(scene: Scene, runs: Machine, way: str) -> None:
    """What comes before is the same however it is published."""
    made = scene.keep_made(runs, WAYS[way])
    scene.begin(WAYS[way], made)
    assert scene.run(runs, WAYS[way]).code == 0
    at = next(n for n, call in enumerate(runs.calls, 1) if call.name == "rename" and call.b.endswith(RECEIPT))
    killed = 0
    while not kill_and_go_on(scene, runs, WAYS[way], Trap(KILL, at=at + killed), made):
        killed += 1
    assert killed > 10
    scene.untouched()


def test_killed_in_the_middle_of_a_write(scene: Scene, runs: Machine) -> None:
    """Half of the bytes are there."""
    scene.begin(WAYS["bin"])
    assert scene.run(runs, WAYS["bin"]).code == 0
    writes = [n for n, call in enumerate(runs.calls, 1) if call.name == "pwrite"]
    for at in writes[::3]:
        assert not kill_and_go_on(scene, runs, WAYS["bin"], Trap(HALF, at=at))


def test_all_processes_killed(scene: Scene, runs: Machine) -> None:
    """As a node that is lost, or a cgroup that is out of memory."""
    at = 5
    while not kill_and_go_on(scene, runs, WAYS["plain"], Trap(KILL_ALL, at=at), processes=True):
        at += 7
    assert at > 100


def test_a_plan_that_is_written_is_whole_or_the_one_before(scene: Scene, runs: Machine) -> None:
    """Killed, or without room, at any call. It is on the disk before it gets its name."""
    file = scene.root / "written" / "plan.json"
    file.parent.mkdir()
    command = ["plan", scene.inputs / "mapping.yaml", "--out", file]
    assert runs.run(*command).code == 0
    whole, before, names = file.read_text(), scene.plan("bin").read_text(), [call.name for call in runs.calls]
    assert names[-2:] == ["fsync", "rename"]
    for at in range(1, len(names) + 1):
        for action in (KILL, HALF, FAIL):
            file.write_text(before)
            ran = runs.run(*command, trap=Trap(action, at=at, number=errno.ENOSPC))
            assert ran.code == (4 if action == FAIL else -9), ran.err
            assert file.read_text() in (before, whole)
            assert action != FAIL or list(file.parent.iterdir()) == [file]
            for left in file.parent.glob("*.tmp"):
                left.unlink()


def test_every_call_is_seen(scene: Scene, runs: Machine, tmp_path: Path) -> None:
    """What the trap counts is what the kernel is asked for, as strace sees it: no call that changes a file escapes."""
    for way, name in ((WAYS["overwrite"], "renameat2"), (WAYS["empty"], "chown")):
        scene.begin(way)
        log = tmp_path / "log"
        calls = "openat,open,creat,write,writev,pwrite64,pwritev,fsync,fdatasync,sync_file_range,ftruncate,truncate,"
        calls += "fallocate,copy_file_range,sendfile,splice,rename,renameat,renameat2,link,linkat,symlink,symlinkat,"
        calls += "mkdir,mkdirat,unlink,unlinkat,rmdir,chmod,fchmod,fchmodat,chown,fchown,lchown,fchownat,utimensat,"
        calls += "setxattr,lsetxattr,fsetxattr,removexattr,lremovexattr,fremovexattr,ioctl,mknod,mknodat"
        command = [tool("strace"), "-f", "-y", "-qq", "-o", str(log), "-e", f"trace={calls}", sys.executable]
        subprocess.run([*command, "-m", "shardmerge", *map(str, scene.command(way))], check=True, capture_output=True)
        traced = Counter(_traced(log, scene.place))
        scene.begin(way)
        assert scene.run(runs, way).code == 0
        inside = [call for call in runs.calls if str(scene.place) in call.a]
        counted = Counter(_COUNTED_AS.get(call.name, call.name) for call in inside)
        assert traced == counted
        assert name in log.read_text()


# What the trap calls by names of its own.
_COUNTED_AS = {"exchange": "rename", "tmpfile": "open"}
_KERNEL = {
    "openat": "open", "pwrite64": "pwrite", "fdatasync": "fsync", "renameat": "rename", "renameat2": "rename",
    "mkdirat": "mkdir", "fchmodat": "chmod", "fchownat": "chown", "utimensat": "utimens",
}  # fmt: skip


def _traced(log: Path, place: Path) -> Iterator[str]:
    for line in log.read_text().splitlines():
        found = re.match(r"\d+ +(\w+)\((.*)", line)
        if found is None or str(place) not in found[2] or "TCGETS" in line:  # a question
            continue
        call = found[1]
        if call in ("openat", "open") and not re.search("O_CREAT|O_WRONLY|O_RDWR", line):
            continue
        if call == "unlinkat":
            call = "rmdir" if "AT_REMOVEDIR" in line else "unlink"
        yield _KERNEL.get(call, call)
