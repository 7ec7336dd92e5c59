"""Medians, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, the smallest and the largest; nothing for no values."""
    if not values:
        return {}
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns the spread of ours over theirs, round by round: what slowed a whole round down cancels out."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True) if other])
