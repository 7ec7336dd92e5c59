"""What a process and those forked from it say to each other: no wait without an end, whatever the system refuses."""

from __future__ import annotations

import subprocess
import sys

# Of parts without tensors, so that all there is to see is who is told what.
_BEGIN = """\
import errno, fcntl, mmap, os, signal
from types import SimpleNamespace
from shardmerge.errors import CheckpointError, Problems, ShardmergeError
from shardmerge.execute.executors import here
from shardmerge.plan.schedule import Schedule

def parts(count):
    return [SimpleNamespace(number=n, shard=SimpleNamespace(tensors=())) for n in range(count)]

def run(count, make):
    here.make_here(parts(count), make, Schedule(2, 1, 1 << 20, 64 << 20), None)

def descriptors():
    return len(os.listdir("/proc/self/fd"))

real, before = os.pipe, descriptors()
def of_a_page():  # as pipe(7) says of a user who has many
    ends = real()
    fcntl.fcntl(ends[1], 1031, 4096)  # F_SETPIPE_SZ
    return ends
os.pipe = of_a_page
"""


def _said(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_more_parts_than_a_pipe_holds() -> None:
    """A page is 1,024 of them. Nobody reads while it is filled, before there is another process."""
    code = """
made = mmap.mmap(-1, 5_000)
def make(part, counters, stopped):
    made[part.number] += 1
run(5_000, make)
print(set(made[:5_000]), descriptors() - before)
"""
    assert _said(code) == "{1} 0"


def test_more_errors_than_a_pipe_holds() -> None:
    """Whoever writes them waits until they are read, and nobody may wait for his end before."""
    code = """
def make(part, counters, stopped):
    raise Problems([CheckpointError("one-of-many", f"number {n}", where="w" * 100) for n in range(2_000)])
try:
    run(2, make)
except Problems as error:
    print(len(error.each()), error.each()[-1].what, descriptors() - before)
"""
    assert _said(code) == "2000 number 1999 0"


def test_whoever_ignores_the_end_of_children_sees_it_all_the_same() -> None:
    """A program that was started so by another hands it on, and the system then keeps no exit code."""
    code = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def make(part, counters, stopped):
    if part.number == 3:
        raise CheckpointError("a-code", "what it met")
run(3, make)
try:
    run(4, make)
except ShardmergeError as error:
    print(error.code, descriptors() - before)
"""
    assert _said(code) == "a-code 0"


def test_a_worker_without_memory_says_so() -> None:
    code = """
def make(part, counters, stopped):
    raise MemoryError
try:
    run(2, make)
except ShardmergeError as error:
    print(error.exit_code, error.code, "--max-memory" in error.hint)
"""
    assert _said(code) == "4 no-memory True"


def test_a_process_that_cannot_be_started_leaves_nothing_open() -> None:
    """The limit of processes; the second of two, so that the first one ends too."""
    code = """
fork, left = os.fork, [True]
def refused():
    if left:
        return left.pop() and fork()
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
os.fork = refused
try:
    run(2, lambda part, counters, stopped: signal.pause())
except ShardmergeError as error:
    print(error.exit_code, error.code, "--workers 1" in error.hint, descriptors() - before)
"""
    assert _said(code) == "4 not-started True 0"
