"""What was promised before it was built, beside what the results say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.reading import DURABLE, QUICK, Result, contender, floor_of, ratio

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class OverFloor:
    """Seconds over those of the floor with the same guarantee, at most ``bar``."""

    bar: float
    synced: bool

    @property
    def words(self) -> str:
        """What is asked."""
        return f"at most {self.bar:g} x the " + ("synced floor, durable" if self.synced else "floor, --no-sync")

    def measured(self, result: Result) -> tuple[str, bool]:
        """Returns the figure and whether it reaches the bar."""
        mine = contender(result, DURABLE if self.synced else QUICK)
        found = ratio(mine, floor_of(result, synced=self.synced))["median"] if mine else 0.0
        return f"{found:.2f} x", 0 < found <= self.bar


@dataclass(frozen=True, slots=True)
class Against:
    """Seconds or bytes of a peer over ours without sync, at least ``bar``."""

    peer: str
    figure: str
    bar: float

    @property
    def words(self) -> str:
        """What is asked."""
        if self.figure == "wall":
            return f"at least {self.bar:g} x faster than {self.peer}, --no-sync"
        return f"at most 1/{self.bar:g} of the memory of {self.peer}"

    def measured(self, result: Result) -> tuple[str, bool]:
        """Returns the figure and whether it reaches the bar."""
        mine, theirs = contender(result, QUICK), contender(result, self.peer)
        if not (mine and theirs):
            return "not measured", False
        found = ratio(theirs, mine, self.figure)["median"]
        return (f"{found:.1f} x" if self.figure == "wall" else f"1/{found:.0f}"), found >= self.bar


@dataclass(frozen=True, slots=True)
class Resident:
    """Most resident MiB of the whole process, both guarantees, every run."""

    bar: int

    @property
    def words(self) -> str:
        """What is asked."""
        return f"at most {self.bar} MiB resident"

    def measured(self, result: Result) -> tuple[str, bool]:
        """Returns the figure and whether it reaches the bar."""
        found = (contender(result, key) for key in (DURABLE, QUICK))
        most = max(float(entry["peak"]["max"]) for entry in found if entry) / _MIB
        return f"{most:.1f} MiB", most <= self.bar


Goal = OverFloor | Against | Resident

GOALS: dict[str, tuple[Goal, ...]] = {
    "zero2-1g": (
        Against("zero_to_fp32", "wall", 6),
        Against("zero_to_fp32-cast", "wall", 8),
        Against("zero_to_torch", "wall", 5),
        Against("zero_to_fp32", "peak", 50),
    ),
    "zero2-4g": (OverFloor(1.15, synced=True), OverFloor(1.15, synced=False), Resident(64)),
    "zero3-1g": (OverFloor(1.3, synced=True), OverFloor(1.3, synced=False)),
    "zero3-4g": (OverFloor(1.3, synced=True), OverFloor(1.3, synced=False), Resident(64)),
    "rename-1g": (OverFloor(1.05, synced=True), OverFloor(1.05, synced=False), Resident(64)),
    "hf-reshard-1g": (Resident(64),),
}


def rows(results: Mapping[str, Result]) -> Iterator[list[str]]:
    """Yields case, bar, figure and verdict; nothing for cases whose floor was another one (schema 1)."""
    for case, goals in GOALS.items():
        result = results.get(case)
        if result is None or contender(result, "floor") is None:
            continue
        for goal in goals:
            figure, reached = goal.measured(result)
            yield [f"`{case}`", goal.words, figure, "reached" if reached else "**not reached**"]
