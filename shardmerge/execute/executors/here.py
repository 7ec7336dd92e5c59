"""On this machine: in this process, or in processes forked from it that take parts from one pipe.

A forked process shares the pages of the plan and of numpy with this one, and starts in milliseconds. It is only done
where this process has a single thread: another one could hold a lock that the copy would wait for forever.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from shardmerge.errors import ResourceError
from shardmerge.execute.engine import Counters, preload
from shardmerge.execute.executors.contract import Make, Progress
from shardmerge.execute.executors.failures import error_from, rows_of
from shardmerge.execute.patience import Halt, interrupted, patiently
from shardmerge.plan.schedule import Schedule
from shardmerge.plan.value import Part
from shardmerge.signals import STOPS

# A part's place in the list, as it goes through the pipe; reads and writes of so few bytes are never torn.
_PLACE = 4
# linux/fcntl.h; a pipe holds 64 KiB unless it is asked to hold more: 16,384 parts.
_F_SETPIPE_SZ = 1031
_USUAL_PIPE, _LARGEST_PIPE = 64 << 10, 1 << 20

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


@dataclass(frozen=True, slots=True)
class _Child:
    """A process, and where it says what went wrong."""

    pid: int
    said: int


def _forked(parts: Sequence[Part], make: Make, how: Schedule, progress: Progress | None) -> None:
    preload([tensor for part in parts for tensor in part.shard.tensors])
    slots = memoryview(mmap.mmap(-1, mmap.PAGESIZE * -(-8 * how.workers // mmap.PAGESIZE))).cast("Q")
    told = _Told(slots, progress)
    places = _filled_pipe(len(parts))
    children: list[_Child] = []
    try:
        with _signals_held():
            for number in range(min(how.processes, len(parts))):
                counters = slots[number * how.threads : (number + 1) * how.threads]
                children.append(_fork(parts, make, counters, places))
        while children:
            time.sleep(_LOOK)
            told()
            for child, status in [(one, status) for one in children if (status := _ended(one)) is not None]:
                children.remove(child)
                _read_last_words(child, status)
    except KeyboardInterrupt as error:
        raise interrupted() from error
    finally:
        os.close(places)
        _kill(children)


def _filled_pipe(count: int) -> int:
    """Returns the reading end of a pipe that holds the places of all parts, and then ends."""
    read, write = os.pipe()
    if count * _PLACE > _USUAL_PIPE:
        fcntl.fcntl(write, _F_SETPIPE_SZ, _LARGEST_PIPE)
    for place in range(count):
        os.write(write, place.to_bytes(_PLACE, "little"))
    os.close(write)
    return read


def _fork(parts: Sequence[Part], make: Make, counters: Counters, places: int) -> _Child:
    read, write = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Child(pid, read)
    code = 1
    try:
        os.close(read)
        _only_parent_hears_signals()
        _end_with(parent)
        for place in iter(lambda: os.read(places, _PLACE), b""):
            make(parts[int.from_bytes(place, "little")], counters, bool)
        code = 0
    except BaseException as error:  # noqa: BLE001  # it must reach the parent
        os.write(write, json.dumps(rows_of(error)).encode()[: mmap.PAGESIZE * 16])
    finally:
        os._exit(code)  # whatever happens: what the parent was doing is not for this one to end


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
    """Returns how a process ended, None while it has not."""
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _read_last_words(child: _Child, code: int) -> None:
    """Raises what a process met, if it did not end well."""
    said = b"".join(iter(lambda: os.read(child.said, 1 << 16), b""))
    os.close(child.said)
    if code:
        raise error_from(json.loads(said)) if said else _died(code)


def _kill(children: Sequence[_Child]) -> None:
    """Ends processes, and waits a while for them: one that waits for the disk ends when that answers."""
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + _GRACE
    for child in children:
        os.close(child.said)
        with suppress(ChildProcessError):
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
