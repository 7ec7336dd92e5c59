"""Runs commands that are stopped, killed or cut off at any call that changes a file, and knows every such call.

A server that has imported everything forks a process for each command, so that a run takes hundredths of a second; it
runs under the traps of ``trap.c``. Several commands can be made to take turns, call by call.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent

# `struct trap` of trap.c: count, at, until, used; armed, action, number, slow_ms, hit, no_exchange, ours, held; names;
# skip.
_TRAP = struct.Struct("=4q8i64s256s256sq")
_COUNTS, _ARMED, _ACTION, _HIT, _OURS, _HELD = 0, 32, 36, 48, 56, 60
_LOG = 8 << 20

NOTHING, KILL, KILL_ALL, KILL_PARENT, HALF, POWER, RAISE, FAIL, SHORT, SKIP, STOP, DENY, HOLD = range(13)

# Whoever sleeps for so long, with all threads of all processes, is asked for their stacks, by a signal that shardmerge
# has no use for; whoever sleeps for very long hangs, and is ended, as is whoever never comes to an end. In seconds. On
# a busy machine a run of a tenth of a second takes 25, in which some thread always waits for a CPU.
_LONG, _LONGEST, _NEVER = 10.0, 60.0, 600.0
_OFTEN = 0.25
_TELL = signal.SIGRTMIN + 7
# How long a process that takes its turn may do nothing that changes a file, in seconds: it waits for others.
_IDLE = 0.4


@dataclass(frozen=True)
class Trap:
    """What is done, and at which call.

    Attributes
    ----------
    action
        One of the names above.
    at, until
        From which call, counted from 1, to which; 0 for none, and for that one only.
    only
        Of calls of this name alone.
    number
        The signal, or the error; of a power cut what becomes of the journal, see ``power``.
    slow_ms
        How long the call takes that raised a signal, as if the disk did not answer.
    no_exchange
        The error of ``renameat2``, as on a system that cannot exchange.
    mount
        The file system that loses its power.
    under
        A directory: calls that look at or read something below it count too.
    skip
        The call, counted from 1, that is not made and said to have succeeded; 0 for none.
    """

    action: int = NOTHING
    at: int = 0
    until: int = 0
    only: str = ""
    number: int = 0
    slow_ms: int = 0
    no_exchange: int = 0
    mount: str = ""
    under: str = ""
    skip: int = 0

    def packed(self, ours: int = 0) -> bytes:
        names = self.only.encode(), self.mount.encode(), self.under.encode()
        numbers = 0, self.action, self.number, self.slow_ms, 0, self.no_exchange, ours, 0
        return _TRAP.pack(0, self.at, self.until, 0, *numbers, *names, self.skip)

    def after(self, calls: int) -> Trap:
        """Returns the trap for a process that makes the next call when so many were made before it."""
        at, until, skip = (max(number - calls, 0) for number in (self.at, self.until, self.skip))
        return replace(self, at=at, until=until, skip=skip)


@dataclass(frozen=True)
class Call:
    """A call that changed a file, or tried to.

    Attributes
    ----------
    pid, name
        Whose, and which.
    a, b
        Paths; of ``pwrite`` ``b`` says whether bytes that are not zero begin a file.
    x, y
        Numbers of the call.
    result
        Negative for an error.
    """

    pid: int
    name: str
    a: str
    b: str
    x: int
    y: int
    result: int


@dataclass(frozen=True)
class Ran:
    """What became of a command.

    Attributes
    ----------
    code
        Exit code; of a signal, negative.
    out, err
        What it said.
    seconds
        How long it took.
    lingered
        How long processes that it had started were there after it, in seconds.
    stacks
        Where its threads were when all had slept for ten seconds, if they ever had.
    """

    code: int
    out: str
    err: str
    seconds: float
    lingered: float
    stacks: str = ""

    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


class Hung(AssertionError):
    """A run that does not end, with the stacks of its threads."""


@dataclass
class Machine:
    """Runs commands; see the module."""

    server: subprocess.Popen[str]
    trap: mmap.mmap
    count: int = 0
    hit: int = 0
    calls: list[Call] = field(default_factory=list)

    def run(self, *argv: object, trap: Trap | None = None, **given: Any) -> Ran:
        """Runs one command.

        Parameters
        ----------
        argv
            Of ``shardmerge``.
        trap
            What is done at which call of it and of the processes that it forks.
        given
            ``processes``: whether a result of any size is worth several. ``ignore``: signals that are ignored from the
            start. ``after``: seconds and a signal that is sent then. ``umask``. ``user``: whose processes they are.
            ``gone``: seconds after which somebody who shows no sign of life is taken to be gone. ``boot``: of the
            system, as receipts name it. ``held``: called here while the process that made the call of a trap ``HOLD``
            waits. ``windows``: whether the shortest range is mapped where mapping is asked for. ``limits``: of
            resources, by their names. ``blind``: whether any disk seems to have room.
            waits. ``moments``: seconds, which of several commands, and a signal that is sent to it then; each begins
            with its first SIGCONT, or after the last of the moments.
        """
        return self.play([argv], trap=trap, **given)[0]

    def play(
        self,
        runs: Sequence[Sequence[object]],
        turns: Sequence[tuple[int, int]] = (),
        trap: Trap | None = None,
        held: Callable[[], object] | None = None,
        **given: Any,
    ) -> list[Ran]:
        """Runs several commands at a time.

        Parameters
        ----------
        runs
            A command line each.
        turns
            Which of them goes on, up to its n-th call from now; all others stand still. A negative number is a signal
            to it. When the turns are over, all run to their end. Without turns all begin at once.
        trap, held, given
            As for ``run``.

        Raises
        ------
        Hung
            One of them does not end; all are killed.
        """
        self.trap[: _TRAP.size] = (trap or Trap()).packed()
        lines = [[str(one) for one in run] for run in runs]
        request = {"runs": lines, "turns": list(turns), **given}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        with self._watched(held):
            answer = json.loads(self.server.stdout.readline())
        self.count, _, _, used = struct.unpack_from("=4q", self.trap, _COUNTS)
        (self.hit,) = struct.unpack_from("=i", self.trap, _HIT)
        assert used <= _LOG, "the log is full"
        self.calls = list(_calls(self.trap[_TRAP.size : _TRAP.size + used]))
        ran = [Ran(**one) for one in answer["ran"]]
        if answer["hung"]:
            raise Hung("\n".join(f"{' '.join(line)}\n{one.stacks}" for line, one in zip(lines, ran, strict=True)))
        return ran

    @contextmanager
    def _watched(self, held: Callable[[], object] | None) -> Iterator[None]:
        """Does something once somebody waits for that."""
        over = threading.Event()

        def watch(do: Callable[[], object]) -> None:
            while not over.wait(0.0002):
                if struct.unpack_from("=i", self.trap, _HELD)[0]:
                    do()
                    self.trap[_HELD : _HELD + 4] = bytes(4)
                    return

        watching = threading.Thread(target=watch, args=(held,)) if held else None
        if watching:
            watching.start()
        try:
            yield
        finally:
            over.set()
            if watching:
                watching.join()


def _calls(log: bytes) -> Iterator[Call]:
    for line in log.decode().splitlines():
        pid, name, a, b, x, y, result = line.split("\t")
        yield Call(int(pid), name, a, b, int(x), int(y), int(result))


@contextmanager
def machine(folder: Path, gcc: str) -> Iterator[Machine]:
    """Starts a server; ``folder`` is for what it needs."""
    library, file = folder / "trap.so", folder / "trap"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([gcc, *flags, "-o", str(library), str(HERE / "trap.c"), "-ldl"], check=True)
    with file.open("wb") as new:
        new.truncate(_TRAP.size + _LOG)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "LD_PRELOAD": str(library), "TRAP_FILE": str(file), "OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(folder),
    }  # fmt: skip
    command, pipe = [sys.executable, "-m", "tests.killing"], subprocess.PIPE
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
    with file.open("r+b") as opened:
        trap = mmap.mmap(opened.fileno(), 0)
    try:
        yield Machine(server, trap)
    finally:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.close()
        server.wait(_LONGEST)
        server.stdout.close()
        trap.close()


# --- the server ---


def _serve() -> None:
    import pkgutil
    from importlib import import_module

    import shardmerge
    from shardmerge import system_errors

    system_errors.WAITS = (0.0,) * len(system_errors.WAITS)
    for module in pkgutil.walk_packages(shardmerge.__path__, "shardmerge."):
        if module.name != "shardmerge.__main__":
            import_module(module.name)
    _adopt_orphans()
    with open(os.environ["TRAP_FILE"], "r+b") as file:
        trap = mmap.mmap(file.fileno(), 0)
    for line in sys.stdin:
        print(json.dumps(_play(trap, json.loads(line))), flush=True)
    os._exit(0)  # to take all modules down in order takes a second


def _adopt_orphans() -> None:
    """Makes processes whose parent is gone children of this one, so that it sees their end (prctl(2))."""
    import ctypes

    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER


def _play(trap: mmap.mmap, request: Mapping[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    texts = [[os.memfd_create("text") for _ in range(3)] for _ in request["runs"]]
    trap[_ARMED : _ARMED + 4] = struct.pack("=i", 1)
    pids = [_start(argv, text, request) for argv, text in zip(request["runs"], texts, strict=True)]
    ended = _Ended(pids)
    while not all(ended.stands_still(pid) for pid in pids):
        ended.look()
    if request["turns"]:
        _take_turns(trap, pids, request["turns"], ended)
    for seconds, who, number in request.get("moments", ()):
        time.sleep(max(started + seconds - time.monotonic(), 0))
        os.kill(pids[who], number)  # whoever ended is still known, until he is waited for
    for pid in pids:
        ended.go_on(pid)
    for seconds, number in request.get("after", ()):
        time.sleep(max(started + seconds - time.monotonic(), 0))
        if pids[0] not in ended.codes:
            os.kill(pids[0], number)
    ended.wait_for_all()
    trap[_ARMED : _ARMED + 4] = struct.pack("=i", 0)
    answers = []
    for pid, text in zip(pids, texts, strict=True):
        out, err, stacks = (_said(fd) for fd in text)
        code, at = ended.codes[pid]
        times = {"seconds": at - started, "lingered": ended.last - at}
        answers.append({"code": code, "out": out, "err": err, **times, "stacks": ended.slow + stacks})
    return {"ran": answers, "hung": ended.hung}


def _start(argv: Sequence[str], text: Sequence[int], request: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(text[0], 1)
    os.dup2(text[1], 2)
    faulthandler.register(_TELL, text[2])
    for number in request.get("ignore", ()):
        signal.signal(number, signal.SIG_IGN)
    os.umask(request.get("umask", 0o022))
    for name, most in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (most, most))
    if user := request.get("user"):
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    os.kill(os.getpid(), signal.SIGSTOP)
    code = 120
    try:
        code = _command(argv, request)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _command(argv: Sequence[str], request: Mapping[str, Any]) -> int:
    from shardmerge.cli.main import main
    from shardmerge.plan import schedule
    from shardmerge.publish import checks, finishing, part_receipts, shares
    from shardmerge.storage import reading

    if request.get("blind"):
        checks.free_bytes = lambda path: 1 << 60
    if request.get("windows"):
        reading._SMALLEST_WINDOW = 1
    if request.get("processes"):
        schedule._WORTH_PROCESSES = 1
    if gone := request.get("gone"):
        finishing._SILENT = gone
        shares.Anything = partial(shares.Anything, gone=gone, look=(gone / 10, gone / 5))
    if boot := request.get("boot"):
        part_receipts.machine = lambda: boot
    sys.argv = ["shardmerge", *argv]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


class _Ended:
    """Who ended, how, and when; and who stands still."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self.codes: dict[int, tuple[int, float]] = {}
        self.still: set[int] = set()
        self.last = time.monotonic()
        self.slow = ""
        self.hung = False
        self._started = self._since = self._seen = time.monotonic()

    def look(self) -> None:
        """Takes note of those that ended or stopped; without any it waits a little."""
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.0005)
        elif os.WIFSTOPPED(status):
            self.still.add(pid)
        else:
            self.last = time.monotonic()
            if pid in self._pids:
                self.codes[pid] = os.waitstatus_to_exitcode(status), self.last

    def wait_for_all(self) -> None:
        """Waits for all processes, and all that they started."""
        while True:
            try:
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            self.look()
            self._watch()

    def _watch(self) -> None:
        """Looks whether anybody does something, or is about to."""
        now = time.monotonic()
        if now - self._seen < _OFTEN or self.hung:
            return
        self._seen = now
        if any(_is_busy(pid) for pid in _below(self._pids)):
            self._since = now
        if now - self._since > _LONG and not self.slow:
            self.slow = "".join(_where(pid) for pid in _below(self._pids))
        if now - self._since > _LONGEST or now - self._started > _NEVER:
            self.hung = True
            for pid in _below(self._pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def stands_still(self, pid: int) -> bool:
        return pid in self.still or pid in self.codes

    def go_on(self, pid: int) -> None:
        self.still.discard(pid)
        if pid not in self.codes:
            os.kill(pid, signal.SIGCONT)


def _below(groups: Sequence[int]) -> Iterator[int]:
    """Yields the processes of some groups."""
    for path in Path("/proc").glob("[0-9]*"):
        group = 0
        with suppress(OSError):
            group = os.getpgid(int(path.name))
        if group in groups:
            yield int(path.name)


def _is_busy(pid: int) -> bool:
    """Tells whether a thread of a process runs, waits for a CPU, or for a disk (proc(5): R and D)."""
    for thread in Path("/proc").glob(f"{pid}/task/*/stat"):
        with suppress(OSError):
            if thread.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False


def _where(pid: int) -> str:
    """Asks a process for the Python stacks of its threads, and returns what the kernel says of each."""
    found = []
    for thread in sorted(Path("/proc").glob(f"{pid}/task/*")):
        for name in ("stat", "wchan", "syscall", "stack"):  # the last for root alone
            with suppress(OSError):
                found.append(f"{pid} {thread.name} {name}: {(thread / name).read_text().strip()}\n")
    with suppress(OSError):
        os.kill(pid, _TELL)
    return "".join(found)


def _take_turns(trap: mmap.mmap, pids: Sequence[int], turns: Sequence[Sequence[int]], ended: _Ended) -> None:
    for who, calls in turns:
        pid = pids[who]
        if pid in ended.codes:
            continue
        if calls < 0:
            os.kill(pid, -calls)
        else:
            _let_go_on(trap, pid, calls, ended)
    _set_counts(trap, at=0)
    for pid in pids:
        ended.go_on(pid)


def _set_counts(trap: mmap.mmap, at: int) -> None:
    trap[:_ARMED] = struct.pack("=4q", 0, at, 0, struct.unpack_from("=4q", trap)[3])


def _let_go_on(trap: mmap.mmap, pid: int, calls: int, ended: _Ended) -> None:
    """Lets one go on until it is about to make its n-th call from now, ended, or waits for others."""
    trap[_ACTION : _ACTION + 4] = struct.pack("=i", STOP)
    trap[_OURS : _OURS + 4] = struct.pack("=i", pid)
    _set_counts(trap, at=calls)
    ended.go_on(pid)
    before, since = -1, time.monotonic()
    while not ended.stands_still(pid):
        ended.look()
        count = struct.unpack_from("=4q", trap)[0]
        if count != before:
            before, since = count, time.monotonic()
        if time.monotonic() - since > _IDLE:
            os.kill(pid, signal.SIGSTOP)
            since = time.monotonic()


def _said(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    text = b"".join(iter(lambda: os.read(fd, 1 << 20), b"")).decode()
    os.close(fd)
    return text


if __name__ == "__main__":
    _serve()
    os._exit(0)  # taking all modules apart takes a second of CPU time, which a busy machine gives in a minute
