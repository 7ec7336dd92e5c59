"""On this machine: in this process, or in processes forked from it that take parts from one pipe.

A forked process shares the pages of the plan and of numpy with this one, and starts in milliseconds. It is only done
where this process has a single thread: another one could hold a lock that the copy would wait for forever.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from shardmerge.errors import ResourceError
from shardmerge.execute.engine import Counters, preload
from shardmerge.execute.executors.contract import Make, Progress
from shardmerge.execute.executors.failures import error_from, rows_of
from shardmerge.execute.patience import Halt, interrupted, patiently
from shardmerge.plan.schedule import Schedule
from shardmerge.plan.value import Part
from shardmerge.signals import STOPS
from shardmerge.storage.descriptors import Descriptor, pipe
from shardmerge.system_errors import not_started

# A part's place in the list, as it goes through the pipe; reads and writes of so few bytes are never torn.
_PLACE = 4

# linux/prctl.h.
_PR_SET_PDEATHSIG = 1

# How often this process looks after the others, in seconds.
_LOOK = 0.05
# How often it looks whether one that it killed is gone, and how long altogether.
_SOON, _GRACE = 0.002, 1.0


def make_here(parts: Sequence[Part], make: Make, how: Schedule, progress: Progress | None) -> None:
    """Makes parts by as many processes and threads as the schedule says: see ``contract.Executor``."""
    if how.apart or (how.processes > 1 and len(parts) > 1):
        _forked(parts, make, how, progress)
        return
    counters = [0] * how.threads
    told = _Told(counters, progress)
    patiently(partial(_make_all, parts, make, counters), told)
    told()


def _make_all(parts: Sequence[Part], make: Make, counters: Counters, halt: Halt) -> None:
    for part in parts:
        halt.check()
        make(part, counters, halt)


class _Told:
    """Passes on what counters say."""

    def __init__(self, counters: Counters, progress: Progress | None) -> None:
        self._counters = counters
        self._progress = progress
        self._before = 0

    def __call__(self) -> None:
        done = sum(self._counters)
        if self._progress is not None:
            self._progress(done - self._before)
        self._before = done


class _Places:
    """A pipe of the places of all parts. It ends after the last.

    It is filled as it empties: a pipe holds 64 KiB, and a page where its user has many (pipe(7)).
    """

    def __init__(self, count: int) -> None:
        self._taken, self._given = pipe()
        os.set_blocking(self._given.fileno(), False)
        self._next, self._count = 0, count

    def fill(self) -> None:
        """Puts in as many as there is room for."""
        with suppress(BlockingIOError):
            while self._next < self._count:
                os.write(self._given.fileno(), self._next.to_bytes(_PLACE, "little"))
                self._next += 1
            self.end()

    def take(self) -> bytes:
        """Takes one out, in whatever process; nothing is left for b""."""
        return os.read(self._taken.fileno(), _PLACE)

    def end(self) -> None:
        """Lets whoever reads see an end: no more come, from this process."""
        self._given.close()

    def close(self) -> None:
        """Closes both ends."""
        self.end()
        self._taken.close()


@dataclass(frozen=True, slots=True)
class _Child:
    """A process, and what it has said so far of what went wrong, through a pipe."""

    pid: int
    words: Descriptor
    said: bytearray = field(default_factory=bytearray)

    def listen(self) -> None:
        """Takes in what it says: whoever writes to a full pipe waits, and its end would never come."""
        with suppress(BlockingIOError):
            while said := os.read(self.words.fileno(), 1 << 16):
                self.said.extend(said)


def _forked(parts: Sequence[Part], make: Make, how: Schedule, progress: Progress | None) -> None:
    preload([tensor for part in parts for tensor in part.shard.tensors])
    slots = memoryview(mmap.mmap(-1, mmap.PAGESIZE * -(-8 * how.workers // mmap.PAGESIZE))).cast("Q")
    told = _Told(slots, progress)
    places = _Places(len(parts))
    children: list[_Child] = []
    try:
        places.fill()
        with _signals_held():
            for number in range(min(how.processes, len(parts))):
                counters = slots[number * how.threads : (number + 1) * how.threads]
                children.append(_fork(parts, make, counters, places))
        while children:
            time.sleep(_LOOK)
            told()
            places.fill()
            for child in children:
                child.listen()
            for child, status in [(one, status) for one in children if (status := _ended(one)) is not None]:
                children.remove(child)
                _read_last_words(child, status)
    except KeyboardInterrupt as error:
        raise interrupted() from error
    finally:
        places.close()
        _kill(children)


def _fork(parts: Sequence[Part], make: Make, counters: Counters, places: _Places) -> _Child:
    read, write = pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        read.close()
        write.close()
        raise not_started("process", error) from error
    if pid:
        write.close()
        os.set_blocking(read.fileno(), False)
        return _Child(pid, read)
    code = 1
    try:
        read.close()
        places.end()
        _only_parent_hears_signals()
        _end_with(parent)
        for place in iter(places.take, b""):
            make(parts[int.from_bytes(place, "little")], counters, bool)
        code = 0
    except BaseException as error:  # noqa: BLE001  # it must reach the parent
        _say(write.fileno(), json.dumps(rows_of(error)).encode())
    finally:
        os._exit(code)  # whatever happens: what the parent was doing is not for this one to end


def _say(pipe: int, words: bytes) -> None:
    view = memoryview(words)
    while view:
        view = view[os.write(pipe, view) :]


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keeps signals for later: a process forked meanwhile is known, and runs no handler of this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _only_parent_hears_signals() -> None:
    """The parent decides: it kills its children. A terminal and a batch system send to all of them at once."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _end_with(parent: int) -> None:
    """Asks the kernel to end this process when its parent ends, however that is and whatever this one is at."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was too late for that


def _ended(child: _Child) -> int | None:
    """Returns how a process ended, None while it has not.

    Where this process ignores SIGCHLD, or reaps children itself, nobody knows: 0. A part that is missing is missed.
    """
    try:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if pid else None


def _read_last_words(child: _Child, code: int) -> None:
    """Raises what a process met, if it did not end well."""
    child.listen()
    child.words.close()
    if child.said:
        raise error_from(json.loads(child.said))
    if code:
        raise _died(code)


def _kill(children: Sequence[_Child]) -> None:
    """Ends processes, and waits a while for them: one that waits for the disk ends when that answers."""
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + _GRACE
    for child in children:
        child.words.close()
        while _ended(child) is None and time.monotonic() < deadline:
            time.sleep(_SOON)


def _died(code: int) -> ResourceError:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return ResourceError(
        "worker-died",
        "a process that made parts was ended by the system",
        found=name,
        hint="the same command goes on where it was; if memory ran out, with fewer --workers or less --max-memory",
    )
