"""Measures whole processes from outside: wall clock, CPU time, resident memory, bytes moved."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")

_LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True, slots=True)
class Measured:
    """One finished process, its children included.

    Attributes
    ----------
    code
        Exit code; negative for the signal that killed it.
    wall, user, system
        Seconds.
    peak
        Most resident bytes of one process, mapped file pages included, as wait4 reports them (``ru_maxrss``). Never
        below about 10 MiB, the memory of the launcher.
    io
        The counters of ``/proc/PID/io``: ``rchar`` and ``wchar`` are bytes of read and write calls, ``read_bytes`` and
        ``write_bytes`` went to and from the disk. Pages of mapped files are in ``read_bytes`` alone. Empty if hidden.
    curve
        (seconds, anonymous bytes, bytes of file pages), sampled every 20 ms.
    stdout, stderr
        What it said.
    """

    code: int
    wall: float
    user: float
    system: float
    peak: int
    io: Mapping[str, int]
    curve: tuple[tuple[float, int, int], ...]
    stdout: str
    stderr: str

    @property
    def cpu(self) -> float:
        """Seconds of CPU, user and system."""
        return self.user + self.system

    @property
    def anonymous(self) -> int:
        """Most resident bytes that are no file pages; sampled, so a little less than the truth."""
        return max((point[1] for point in self.curve), default=0)

    @property
    def mapped(self) -> int:
        """Most resident bytes of file pages, which the system can take back; sampled too."""
        return max((point[2] for point in self.curve), default=0)


def measure(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, group: str = ""
) -> Measured:
    """Runs a command to its end and returns what it cost. Whatever stops us stops the command too.

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

    Raises
    ------
    RuntimeError
        The launcher itself failed, which has nothing to do with the command.
    """
    with tempfile.TemporaryDirectory() as folder, _held_back() as deliver:
        report = Path(folder) / "report"
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(report), group, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        try:
            deliver()
            stdout, stderr = launcher.communicate()
        except BaseException:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.communicate()
            raise
        if launcher.returncode:
            raise RuntimeError(f"the launcher failed with {launcher.returncode}: {stderr[-2000:]}")
        found = json.loads(report.read_text("ascii"))
    curve = tuple((seconds, anonymous, mapped) for seconds, anonymous, mapped in found.pop("curve"))
    return Measured(**found, curve=curve, stdout=stdout, stderr=stderr)


@contextmanager
def _held_back() -> Iterator[Callable[[], object]]:
    """Holds signals back until the function is called: an interrupt within ``Popen`` would lose sight of its process.

    The mask is inherited; the launcher lifts it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def order(items: Sequence[_Item], number: int) -> list[_Item]:
    """Returns the items in the order of a round: drawn, and the same whenever the program runs.

    Were it rotated, each would always come after the same other one, and take over what memory that one has left: on
    a machine that hands freed memory to its host, ``cp`` of 2 GB took 0.4 s after some and 2 s after others.
    """
    return random.Random(number).sample(items, len(items))


def thinned(curve: Sequence[tuple[float, int, int]], points: int = 200) -> list[tuple[float, int, int]]:
    """Returns at most so many points of a curve, each the highest of those it stands for."""
    step = -(-len(curve) // points) or 1
    parts = (curve[start : start + step] for start in range(0, len(curve), step))
    return [max(part, key=lambda point: point[1] + point[2]) for part in parts]


def succeed(measured: Measured) -> Measured:
    """Returns it, or raises with what it said if it failed."""
    if measured.code:
        raise RuntimeError(f"exit code {measured.code}\n{measured.stdout[-2000:]}\n{measured.stderr[-4000:]}")
    return measured


def answer(measured: Measured) -> dict[str, object]:
    """Returns the JSON object that a command printed."""
    found: dict[str, object] = json.loads(succeed(measured).stdout)
    return found
