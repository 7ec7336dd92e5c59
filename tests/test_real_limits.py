"""Full disks and limits of a process, at a few values each; ``make soak`` tries fifty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.killing import Machine
from tests.real_limits import LIMITS, Limited, mounted

_MAY_MOUNT = {"room on a tmpfs", "room on ext4", "read-only mount"}


@pytest.fixture(scope="module")
def limited(accidents: Path, runs: Machine) -> Limited:
    return Limited(accidents / "limited", runs)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_ends_a_run_and_the_next_one_goes_on(limit: str, limited: Limited) -> None:
    if limit in _MAY_MOUNT and os.geteuid():
        pytest.skip("mounting takes root")
    try:
        found = LIMITS[limit](limited, 2)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot mount here: {error.stderr}")
    assert found.wrong == []
    assert any(not outcome.startswith("exit 0") for outcome in found.outcomes)


def test_a_read_only_mount_is_named(limited: Limited) -> None:
    """The permissions of the directory have nothing to do with it."""
    try:
        with mounted("-t", "tmpfs", "-o", "ro", "tmpfs") as place:
            error = limited.run(place / "out").json()["errors"][0]
    except subprocess.CalledProcessError as refused:
        pytest.skip(f"cannot mount here: {refused.stderr}")
    assert error["what"] == "the file system is mounted read-only"
    assert "mount the file system for writing" in error["hint"]


def _command(*words: object, **given: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardmerge", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **given)  # type: ignore[call-overload,no-any-return]


def test_a_process_that_may_not_load_its_libraries_says_that_memory_is_short(tmp_path: Path, limited: Limited) -> None:
    """Not that this is a bug: numpy says so of the loader of the system."""
    few = [
        "sh",
        "-c",
        f"ulimit -v 80000; exec {sys.executable} -m shardmerge convert {limited.source} {tmp_path}/out --dtype fp16",
    ]
    done = subprocess.run(few, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "[no-memory]" in done.stderr
    assert "ulimit -v" in done.stderr


def test_a_current_directory_that_was_removed(tmp_path: Path, limited: Limited) -> None:
    """Paths that begin at the root need none; of others the hint says what to do."""
    gone = tmp_path / "gone"

    def run(out: str) -> subprocess.CompletedProcess[str]:
        gone.mkdir()
        return _command("convert", limited.source, out, cwd=gone, preexec_fn=gone.rmdir)

    done = run("out")
    assert done.returncode == 4
    assert "the current directory was removed: change to another one" in done.stderr
    assert run(str(tmp_path / "out")).returncode == 0


def test_a_command_whose_parent_ignores_the_end_of_children() -> None:
    """It would take a child that failed for one that did not (``subprocess``, where the system keeps no exit code)."""
    code = "import signal\nfrom shardmerge.cli import main\n"
    code += "main._guarded = lambda: print(signal.getsignal(signal.SIGCHLD).name)\nmain.main()"
    told = f"trap '' CHLD; exec '{sys.executable}' -c \"$CODE\""
    done = subprocess.run(
        ["bash", "-c", told], capture_output=True, text=True, check=True, env={**os.environ, "CODE": code}
    )
    assert done.stdout == "SIG_DFL\n"
