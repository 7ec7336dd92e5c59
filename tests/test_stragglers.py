"""Parts that somebody is slow at are made again by those who would wait: `--part any`."""

from __future__ import annotations

import random

import pytest

from benchmarks.stragglers import simulate
from shardmerge.plan.schedule import late_part

SIZES = [100, 100, 400]


@pytest.mark.parametrize(
    ("under_way", "own", "found"),
    [
        ({}, 1.0, None),
        ({0: 149.0}, 1.0, None),  # 1.5 times 100 bytes at one second a byte
        ({0: 151.0}, 1.0, 0),
        ({0: 151.0, 1: 160.0}, 1.0, 1),
        ({0: 170.0, 2: 599.0}, 1.0, 0),  # a large part may take longer
        ({0: 1000.0}, 1.6, None),  # who is slow himself helps nobody
    ],
)
def test_a_part_is_late_for_its_size(under_way: dict[int, float], own: float, found: int | None) -> None:
    assert late_part(under_way, SIZES, 1.0, own) == found


@pytest.mark.parametrize("seed", range(3))
def test_one_slow_worker_in_ten_costs_less_than_a_seventh(seed: int) -> None:
    """1,000 parts, 64 workers, one in ten four times slower: within 1.15 of the ideal, a handful made twice."""
    draw = random.Random(seed)
    slowness = [4.0] * 6 + [1.0] * 58
    sizes = [draw.randint(900, 1035) for _ in range(1000)]
    ratio, twice = simulate(sizes, slowness, draw, again=True)
    without, _ = simulate(sizes, slowness, draw, again=False)
    assert ratio < 1.15 < without
    assert 0 < twice <= 6
