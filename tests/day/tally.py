"""What was done on the day, and what went wrong: the result file."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

# Seconds between two points of the curves.
_EVERY = 15.0
_HOUR = 3600.0


@dataclass
class Tally:
    """Counts, curves and violations; see ``json`` for what they are."""

    seed: int
    began: float = field(default_factory=time.monotonic)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    violations: list[str] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    service: list[tuple[float, int, int, int]] = field(default_factory=list)
    largest_share: float = 0.0
    staged: int = 0

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def count(self, what: str, which: str, by: int = 1) -> None:
        self.counts[what][which] += by

    def wrong(self, what: str) -> None:
        self.violations.append(f"{self.seconds():.0f} s: {what}")
        print("WRONG", self.violations[-1], flush=True)

    def sample(self, resident: int, descriptors: int, staging: int) -> None:
        """Adds to the curves: the most of each within every quarter of a minute."""
        self.staged = max(self.staged, staging)
        at = self.seconds() // _EVERY * _EVERY
        if not self.curve or self.curve[-1][0] != at:
            self.curve.append([at, 0, 0, 0])
        last = self.curve[-1]
        last[1:] = [max(old, new) for old, new in zip(last[1:], (resident, descriptors, staging), strict=True)]

    def answered(self, resident: int, descriptors: int) -> None:
        """Adds what the process that uses the API had after an answer, when it was idle."""
        self.service.append((self.seconds(), resident, descriptors, len(self.service)))

    def json(self) -> dict[str, object]:
        return {
            "what": "a day's work in an hour: conversions, kills and errors, and what was wrong after each",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "kernel": platform.release(),
            "seed": self.seed,
            "minutes": round(self.seconds() / 60, 1),
            "cpus": len(os.sched_getaffinity(0)),
            "counts": {what: dict(sorted(found.items())) for what, found in sorted(self.counts.items())},
            "largest share of the planned peak": round(self.largest_share, 3),
            "most staging bytes": self.staged,
            "service": flatness(self.service),
            "violations": self.violations,
            "curve": self.curve,
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.json(), indent=1) + "\n")


def flatness(points: Sequence[tuple[float, int, int, int]]) -> dict[str, float]:
    """Returns how the process that uses the API changed: from its first tenth on, in which all is done once.

    Slopes are those of the line of least squares.
    """
    after = points[len(points) // 10 :]
    if len(after) < 2:
        return {}
    resident, descriptors = [point[1] for point in after], [point[2] for point in after]
    return {
        "answers": len(points),
        "descriptors at least": min(descriptors),
        "descriptors at most": max(descriptors),
        "descriptors per hour": round(slope([(p[0], p[2]) for p in after]) * _HOUR, 3),
        "resident first": resident[0],
        "resident last": resident[-1],
        "resident at most": max(resident),
        "resident bytes per hour": round(slope([(p[0], p[1]) for p in after]) * _HOUR),
        "resident bytes per thousand answers": round(slope([(p[3], p[1]) for p in after]) * 1000),
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the line of least squares."""
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0
