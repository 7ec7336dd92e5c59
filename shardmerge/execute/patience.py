"""Waiting for work that the disk may hold up: a sync can take minutes, and Python sees no signal before it returns.

So work is done in another thread, and the one that sees signals waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from shardmerge.errors import InterruptedRunError
from shardmerge.system_errors import not_started

_Found = TypeVar("_Found")

# How often the thread that waits looks after what it was asked to look after, in seconds.
_LOOK = 0.1
# How long work may take to stop, in seconds: a tile, or a sync that the disk does not finish.
GRACE = 1.5


class Halt:
    """Whether work is to stop; what is under way asks now and then."""

    def __init__(self) -> None:
        self._asked = False
        self._lock = threading.Lock()

    def __call__(self) -> bool:
        """Tells whether a stop was asked for."""
        return self._asked

    def ask(self) -> None:
        """Asks for a stop, once what must not be stopped in the middle is done."""
        held = self._lock.acquire(timeout=GRACE)
        self._asked = True
        if held:
            self._lock.release()

    def check(self) -> None:
        """Raises ``interrupted`` if a stop was asked for."""
        if self._asked:
            raise interrupted()

    @contextmanager
    def done_or_not(self) -> Iterator[None]:
        """Does what follows whole, or raises ``interrupted`` and does nothing: whoever asked knows which."""
        with self._lock:
            self.check()
            yield


def interrupted() -> InterruptedRunError:
    """Returns the error of a run that was stopped."""
    return InterruptedRunError("interrupted", "stopped before the result was published")


def begin(thread: threading.Thread) -> None:
    """Starts a thread.

    Raises
    ------
    ResourceError
        ``not-started``: the system has no room for another one.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise not_started("thread", error) from error


def patiently(work: Callable[[Halt], _Found], look: Callable[[], object] = bool, *, last: bool = False) -> _Found:
    """Does work in a thread of its own, and returns what it returns or raises what it raises.

    Parameters
    ----------
    work
        Is given what tells it to stop.
    look
        Called every tenth of a second in the thread that waits.
    last
        Whether nothing is to come after it: stopped too late, when it came to its end all the same, it was not stopped.

    Raises
    ------
    InterruptedRunError
        ``interrupted``: Ctrl-C or a signal. Work that waits for the disk goes on until the process ends.
    """
    found: list[_Found] = []
    failed: list[BaseException] = []
    halt, ended = Halt(), threading.Event()

    def do() -> None:
        try:
            found.append(work(halt))
        except BaseException as error:  # noqa: BLE001  # whatever happens in a thread must reach the caller
            failed.append(error)
        finally:
            ended.set()

    try:
        begin(threading.Thread(target=do, daemon=True))
        # Not by Thread.join: a signal in it makes Python 3.11 take a thread for ended that is not (bpo-45274).
        while not ended.wait(_LOOK):
            look()
    except BaseException as error:
        halt.ask()
        ended.wait(GRACE)
        if not isinstance(error, KeyboardInterrupt):
            raise
        if not failed and not (found and last):
            raise interrupted() from error
    if failed:
        raise failed[0]
    return found[0]
