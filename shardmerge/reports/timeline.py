"""Bytes done and resident memory over the time of a run, in at most a few hundred points however long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shardmerge.storage.limits import family_bytes

# Points that are kept; twice as many are never held.
MOST_POINTS = 200
# The shortest time between two points, in seconds. It doubles whenever there are too many.
_SHORTEST = 0.05


@dataclass(frozen=True, slots=True)
class Point:
    """A moment: seconds since the beginning, bytes written so far, resident bytes of all processes here."""

    seconds: float
    done: int
    resident: int


@dataclass(slots=True)
class Timeline:
    """The record of one run: begun when it is made, and told of bytes as a progress bar is.

    Attributes
    ----------
    total
        Bytes of all tensors; what is done before it is known is planning.
    kept
        Bytes that an earlier run had made: those of the first call, in which nothing was written yet.
    phases
        (name, seconds at which it began).
    points
        Ascending.
    """

    clock: Callable[[], float] = time.monotonic
    memory: Callable[[], int] = family_bytes
    total: int = 0
    kept: int = 0
    phases: list[tuple[str, float]] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    began: float = field(default_factory=time.time)
    _start: float = 0.0
    _apart: float = _SHORTEST
    _done: int = 0

    def __post_init__(self) -> None:
        self._start = self.clock()
        self._enter("planning")

    def planned(self, total: int) -> None:
        """Planning ends, and what follows are calls of ``advance``, the first of them with what was made before."""
        self.total = total

    def advance(self, nbytes: int) -> None:
        """Counts bytes, or none: it is called several times a second."""
        if len(self.phases) == 1:
            self.kept = nbytes
            self._enter("writing")
        self._done += nbytes
        if len(self.phases) == 2 and self._done >= self.total:
            self._enter("publishing")
        elif self.seconds() - self.points[-1].seconds >= self._apart:
            self._note()

    def ended(self) -> None:
        """Takes the last point."""
        self._note()

    def seconds(self) -> float:
        """Returns the seconds since the beginning."""
        return self.clock() - self._start

    def _enter(self, phase: str) -> None:
        self.phases.append((phase, round(self.seconds(), 3)))
        self._note()

    def _note(self) -> None:
        self.points.append(Point(round(self.seconds(), 3), self._done, self.memory()))
        if len(self.points) >= MOST_POINTS:
            self._apart *= 2
            begins = {second for _, second in self.phases}
            last = len(self.points) - 1
            self.points = [
                one for place, one in enumerate(self.points) if place % 2 == last % 2 or one.seconds in begins
            ]
