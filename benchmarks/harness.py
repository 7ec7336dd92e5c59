"""Measures whole processes from outside: wall clock, CPU time, peak resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Forks, executes and waits. It stands between us and what is measured because Linux counts the memory that a process
# had before it called exec: the child of a test runner of 300 MiB would never be seen below 300 MiB. This one has 10.
# Pages of mapped files count as resident though the system can drop them at any time, so a thread also looks, fifty
# times a second, at what it cannot drop.
_LAUNCHER = """
import os, sys, threading, time
report, group, *command = sys.argv[1:]
started = time.monotonic()
child = os.fork()
if not child:
    try:
        if group:
            with open(group, "w") as members:
                members.write(str(os.getpid()))
        os.execvp(command[0], command)
    except OSError as error:
        print(error, file=sys.stderr)
    os._exit(127)
anonymous, ended = 0, threading.Event()
def watch():
    global anonymous
    while not ended.wait(0.02):
        try:
            with open(f"/proc/{child}/status") as status:
                kib = next((line.split()[1] for line in status if line.startswith("RssAnon:")), 0)
        except OSError:
            return
        anonymous = max(anonymous, int(kib))
watcher = threading.Thread(target=watch)
watcher.start()
_, status, used = os.wait4(child, 0)
wall = time.monotonic() - started
ended.set()
watcher.join()
with open(report, "w") as file:
    code = os.waitstatus_to_exitcode(status)
    print(code, wall, used.ru_utime, used.ru_stime, used.ru_maxrss, anonymous, file=file)
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One finished process.

    Attributes
    ----------
    code
        Exit code; negative for the signal that killed it.
    wall, user, system
        Seconds.
    peak
        Most resident bytes, mapped file pages included, as wait4 reports them (``ru_maxrss``). Never below about
        10 MiB, the memory of the launcher.
    anonymous
        Most resident bytes that are no file pages, sampled, so a little less than the truth.
    stdout, stderr
        What it said.
    """

    code: int
    wall: float
    user: float
    system: float
    peak: int
    anonymous: int
    stdout: str
    stderr: str

    @property
    def cpu(self) -> float:
        """Seconds of CPU, user and system."""
        return self.user + self.system


def measure(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, group: str = ""
) -> Measured:
    """Runs a command to its end and returns what it cost.

    Parameters
    ----------
    command
        Program and arguments.
    env
        Variables added to ours.
    cwd
        Where it runs.
    group
        The ``cgroup.procs`` file of a control group that the process joins before it starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(report), group, *map(str, command)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        code, wall, user, system, peak, anonymous = report.read_text("ascii").split()
    return Measured(
        code=int(code),
        wall=float(wall),
        user=float(user),
        system=float(system),
        peak=int(peak) << 10,
        anonymous=int(anonymous) << 10,
        stdout=done.stdout,
        stderr=done.stderr,
    )


def succeed(measured: Measured) -> Measured:
    """Returns it, or raises with what it said if it failed."""
    if measured.code:
        raise RuntimeError(f"exit code {measured.code}\n{measured.stdout[-2000:]}\n{measured.stderr[-4000:]}")
    return measured


def answer(measured: Measured) -> dict[str, object]:
    """Returns the JSON object that a command printed."""
    found: dict[str, object] = json.loads(succeed(measured).stdout)
    return found
