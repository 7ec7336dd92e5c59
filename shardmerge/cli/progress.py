"""What a command is doing: a bar in a terminal, lines in a log, JSON lines for machines. All of it goes to stderr.

A log says what takes longer than five seconds: a line when that is noticed, then one for every twentieth that is done,
ten seconds apart, and one every thirty seconds whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

from shardmerge.cli import colour
from shardmerge.errors import plain

if TYPE_CHECKING:
    from types import FrameType

    from tqdm import tqdm

# In seconds: what is over sooner is not told; the longest silence; the shortest time between two lines.
_SOON, _LONGEST, _SHORTEST = 5.0, 30.0, 10.0
# How much more has to be done before it is told sooner than the longest silence.
_SHARE = 0.05
# How often planning looks at the clock, in seconds; in a terminal a line is replaced as often.
_LOOK = 0.5


def warn(text: str, *, machine: bool) -> None:
    """Says a warning on stderr, where JSON lines are asked for as one of them."""
    colour.echo(json.dumps({"warning": text}) if machine else f"warning: {plain(text)}", err=True)


@contextmanager
def planning(label: str, *, quiet: bool, machine: bool = False, phase: str = "planning") -> Iterator[None]:
    """Says that a plan is made, or headers are read, while it is: of many files, on disks that may be slow.

    By a timer and no thread: with a second thread the process could not fork, and the plan would say so.
    """
    if (quiet and not machine) or any(signal.getitimer(signal.ITIMER_REAL)):
        yield
        return
    told = _Told(phase, label, 0, machine=machine)

    def look(signum: int, frame: FrameType | None) -> None:
        told.look()

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGALRM) is look:  # and no stop that waits for its moment: see `stopping`
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        told.wipe()


Advance = Callable[[int], None]


class Watch(Protocol):
    """Whoever shows what is done."""

    def __call__(self, nbytes: int) -> None:
        """Counts bytes; called now and then with 0 too."""

    def begin(self, phase: str) -> None:
        """Says that a phase without bytes begins."""


@contextmanager
def progress_bar(  # what is told, and to whom
    total: int, *, quiet: bool, label: str, phase: str = "writing", after: str = "", machine: bool = False
) -> Iterator[Watch | None]:
    """Yields what is told of bytes done and of phases; None where nobody watches.

    Parameters
    ----------
    total
        Bytes.
    quiet
        Nothing is to be said.
    label, phase
        To what it is done, and what.
    after
        The phase that begins with the last byte, if any.
    machine
        JSON lines are asked for, quiet or not.
    """
    if machine or not (quiet or sys.stderr.isatty()):
        yield _Told(phase, label, total, machine=machine, after=after)
    elif quiet:
        yield None
    else:
        with _bar(total, label, phase, after) as bar:
            yield bar


@contextmanager
def _bar(total: int, label: str, phase: str, after: str) -> Iterator[Watch]:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread: a process with a second one cannot fork
    desc = f"{phase} {label}"
    with tqdm(total=total, unit="B", unit_scale=True, desc=desc, file=sys.stderr, mininterval=0.2, leave=False) as bar:
        yield _Bar(bar, label, after)


@dataclass(slots=True)
class _Bar:
    """A bar in a terminal, which goes when all is done; what comes after the last byte is a line in its place."""

    bar: tqdm[NoReturn]
    label: str
    after: str

    def __call__(self, nbytes: int) -> None:
        if self.bar.update(nbytes):  # only when it redraws: /proc is not free
            self._weigh()
        if self.after and self.bar.n >= (self.bar.total or 0):
            self.begin(self.after)

    def begin(self, phase: str) -> None:
        self.after = ""
        self._weigh()
        self.bar.set_description_str(f"{phase} {self.label}")

    def _weigh(self) -> None:
        self.bar.set_postfix_str(f"{_resident() / 2**20:.0f} MiB resident", refresh=False)


@dataclass(slots=True)
class _Told:
    """A phase as it goes on, and what was said of it.

    Attributes
    ----------
    phase, label
        What is done, and to what.
    total, done
        Bytes; no total for a phase that has none.
    machine
        JSON lines, from the first moment on.
    after
        The phase that begins with the last byte, if any.
    """

    phase: str
    label: str
    total: int
    machine: bool
    after: str = ""
    done: int = 0
    _began: float = 0.0
    _said: float = 0.0
    _said_done: int = 0
    _shown: bool = False

    def __post_init__(self) -> None:
        self._begin()
        if self.machine:
            self._say()

    def __call__(self, nbytes: int) -> None:
        """Counts bytes; with the last of them the next phase begins."""
        self.done += nbytes
        if self.after and self.done >= self.total:
            self.begin(self.after)
        else:
            self.look()

    def begin(self, phase: str) -> None:
        """Begins a phase without bytes; it is told where the last one was."""
        spoken = self.machine or self._said > self._began
        self.phase, self.total, self.after = phase, 0, ""
        self._begin()
        if spoken:
            self._say()

    def look(self) -> None:
        """Says how far it is where it is time to."""
        silent = time.monotonic() - self._said
        more = self.total and self.done - self._said_done >= _SHARE * self.total
        if silent >= _LONGEST or (more and silent >= _SHORTEST and self._said > self._began):
            self._say()

    def wipe(self) -> None:
        """Takes away the line that a terminal shows."""
        if self._shown:
            _write("\r\033[K")

    def _begin(self) -> None:
        self._began = time.monotonic()
        self._said = self._began - _LONGEST + _SOON

    def _say(self) -> None:
        now = time.monotonic()
        seconds, self._said, self._said_done = now - self._began, now, self.done
        if self.machine:
            _write(json.dumps(self._row(seconds)) + "\n")
        elif sys.stderr.isatty():
            _write(f"\r\033[K{self._line(seconds)}")
            self._said, self._shown = now - _LONGEST + _LOOK, True
        else:
            _write(self._line(seconds) + "\n")

    def _line(self, seconds: float) -> str:
        what = [f"{seconds:.0f} s"]
        if self.total:
            from shardmerge.plan.tables import human_bytes  # planning has no total: its timer may interrupt this import

            rate, left = self._speed(seconds)
            what = [f"{100 * self.done / self.total:.0f} % of {human_bytes(self.total)}", f"{human_bytes(int(rate))}/s"]
            what += [f"{_duration(left)} left"] if left is not None else []
        return f"{self.phase} {self.label}: {', '.join(what)}, {_resident() / 2**20:.0f} MiB resident"

    def _row(self, seconds: float) -> dict[str, object]:
        rate, left = self._speed(seconds)
        known = {"done": self.done, "total": self.total, "bytes_per_second": round(rate)} if self.total else {}
        more = {} if left is None else {"seconds_left": round(left, 1)}
        row = {"phase": self.phase, "label": self.label, "seconds": round(seconds, 1), **known, **more}
        return row | {"resident_bytes": _resident()}

    def _speed(self, seconds: float) -> tuple[float, float | None]:
        """Returns bytes a second, and the seconds that are left where that can be told."""
        rate = self.done / seconds if seconds else 0.0
        return rate, (self.total - self.done) / rate if rate and self.total else None


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _resident() -> int:
    """Returns the resident memory of this process, or 0 where /proc does not tell.

    It imports nothing, and no codec either: the timer of planning interrupts imports, and a module in the middle of one
    cannot be used.
    """
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _write(text: str) -> None:
    """Writes to stderr at once, past Python's buffers: their locks must be free when the process forks."""
    sys.stderr.flush()
    try:
        os.write(sys.stderr.fileno(), text.encode())
    except (OSError, ValueError):
        return  # nobody reads; or stderr is no file, in a test
