"""Commands in memory control groups, and what can be known of the processes of a namespace in which all are ours."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.memory_group import MemoryGroup, memory_group

# A process joins the group and becomes the command.
_JOIN = 'echo $$ > "$0" && exec "$@"'
# How long what a command has started may outlive it, in seconds.
_LINGER = 10.0
# A command that takes longer hangs, whoever else uses the machine.
_LONGEST = 900.0


@dataclass
class Command:
    """A command that runs, or has run.

    Attributes
    ----------
    code
        None while it runs; of a signal, negative.
    peak
        Most resident bytes of one of its processes.
    """

    argv: list[str]
    pid: int
    out: IO[str]
    err: IO[str]
    began: float
    code: int | None = None
    peak: int = 0
    seconds: float = 0.0

    def said(self) -> str:
        return _text(self.out)

    def complained(self) -> str:
        return _text(self.err)

    def look(self) -> bool:
        """Tells whether it has ended."""
        if self.code is None:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code, self.peak = os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024
                self.seconds = time.monotonic() - self.began
        return self.code is not None

    def send(self, number: int) -> None:
        if not self.look():
            os.kill(self.pid, number)


def _ended(commands: Sequence[Command]) -> bool:
    """Looks at every one of them, so that each one's seconds are its own."""
    return sum(one.look() for one in commands) == len(commands)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


@dataclass
class Processes:
    """Starts and watches; ``tick`` is called while it waits."""

    groups: list[MemoryGroup]
    environment: dict[str, str]
    tick: Callable[[], None] = bool
    staying: set[int] = field(default_factory=set)
    _started: list[Command] = field(default_factory=list)

    def start(self, argv: Sequence[str]) -> Command:
        """Starts a command in a group that no other running command is in."""
        group = self.groups[sum(not one.look() for one in self._started)]
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115  # read later
        command = ["sh", "-c", _JOIN, group.procs, *argv]
        child = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=self.environment)
        child.returncode = 0  # it is waited for here: subprocess leaves it alone
        started = Command(list(argv), child.pid, out, err, time.monotonic())
        self._started = [one for one in self._started if one.code is None] + [started]
        return started

    def wait(self, *commands: Command, seconds: float = _LONGEST) -> bool:
        """Waits so long; tells whether all have ended."""
        until = time.monotonic() + seconds
        while not _ended(commands):
            if time.monotonic() > until:
                return False
            self.tick()
            time.sleep(0.004)
        return True

    def run(self, argv: Sequence[str]) -> Command:
        started = self.start(argv)
        if not self.wait(started):
            started.send(signal.SIGKILL)
            self.wait(started)
        return started

    def left_over(self) -> list[str]:
        """Waits until nobody but those that stay is there, and returns who will not go; reaps whoever came to us."""
        until = time.monotonic() + _LINGER
        while found := self._others():
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [_name(pid) for pid in found]

    def _others(self) -> list[int]:
        here = {os.getpid(), *self.staying}
        others = [
            int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal() and int(path.name) not in here
        ]
        for pid in others:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return [pid for pid in others if Path(f"/proc/{pid}").exists()]

    def killed_for_memory(self) -> int:
        """Returns how many processes the groups killed because they needed more."""
        return sum(_killed(group) for group in self.groups)


def _killed(group: MemoryGroup) -> int:
    folder = group.peak_file.parent
    for name in ("memory.oom_control", "memory.events"):
        if (folder / name).exists():
            words = (folder / name).read_text().split()
            return int(words[words.index("oom_kill") + 1])
    raise FileNotFoundError(folder)


def _name(pid: int) -> str:
    with suppress(OSError):
        return f"{pid}: {Path(f'/proc/{pid}/cmdline').read_text()[:200]!r}"
    return str(pid)


def family(pid: int) -> list[int]:
    """Returns a process and all that it has started."""
    found = [pid]
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += family(int(child))
    return found


@contextmanager
def groups(count: int, limit: int) -> Iterator[list[MemoryGroup]]:
    """Makes groups with a limit in bytes, page cache included.

    Raises
    ------
    RuntimeError
        Nobody lets us: the day means nothing without them.
    """
    if not count:
        yield []
        return
    with memory_group(limit) as one, groups(count - 1, limit) as others:
        if one is None:
            raise RuntimeError("no memory control group can be made here")
        yield [one, *others]


@dataclass
class Service:
    """The process that uses the Python API; see ``api_process``."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, program: Sequence[str], group: MemoryGroup, environment: dict[str, str]) -> Service:
        command = ["sh", "-c", _JOIN, group.procs, *program]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        return cls(process)

    def ask(self, line: str, tick: Callable[[], None] = bool) -> str:
        """Sends a request and returns the answer; empty if the process has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        while not select.select([self.process.stdout], [], [], 0.05)[0]:
            tick()
        return self.process.stdout.readline()

    def figures(self) -> tuple[int, int]:
        """Returns resident bytes and descriptors, from outside."""
        pid = self.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path(f"/proc/{pid}/fd").iterdir()))
