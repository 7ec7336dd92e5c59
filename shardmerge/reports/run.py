"""What a report says of the run itself, beside what the receipt says of its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardmerge.plan.schedule import Schedule
from shardmerge.publish.results import Result
from shardmerge.reports.timeline import Point, Timeline


@dataclass(frozen=True, slots=True)
class Run:
    """A run that published a result.

    Attributes
    ----------
    began
        When, in seconds since the epoch.
    seconds
        How long it took, planning and publishing included.
    phases, points, kept
        As in the timeline.
    total
        Bytes of all tensors.
    read, written, cloned
        Bytes of data that moved; those that were made by an earlier run included.
    planned_peak
        Most resident bytes, as planned.
    workers, processes
        How many there were.
    checks
        What was checked, in words.
    """

    began: float
    seconds: float
    phases: tuple[tuple[str, float], ...]
    points: tuple[Point, ...]
    kept: int
    total: int
    read: int
    written: int
    cloned: int
    planned_peak: int
    workers: int
    processes: int
    checks: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The highest of the samples, in bytes."""
        return max(point.resident for point in self.points)

    @property
    def rate(self) -> float:
        """Bytes of the result a second, over the whole time."""
        return (self.total - self.kept) / max(self.seconds, 1e-9)


def run_of(timeline: Timeline, result: Result, how: Schedule) -> Run | None:
    """Returns what a timeline tells of a run; None where it found the result published, and did nothing."""
    if not result.made:
        return None
    timeline.ended()
    outcome = result.outcome
    return Run(
        timeline.began,
        timeline.points[-1].seconds,
        tuple(timeline.phases),
        tuple(timeline.points),
        timeline.kept,
        timeline.total,
        outcome.bytes_read,
        outcome.bytes_written,
        outcome.bytes_cloned,
        how.peak,
        how.workers,
        how.processes,
        tuple(_checks(result)),
    )


def _checks(result: Result) -> Iterator[str]:
    yield from result.plan.checks
    records = result.records
    if records.checked:
        bytes_of = f"{records.checked:,} records of the sources ({records.checked_bytes:,} bytes)"
        yield f"{bytes_of} have the CRC-32 that their files state"
    yield from (f"not checked: {rest}" for rest in records.unchecked())
