"""Simulates workers that take any part, some of them slow: what the last part waits for.

    python -m benchmarks.stragglers [--parts 1000] [--workers 64] [--slow 0.1] [--times 4] [--draws 20]

Nothing is converted: each part takes as long as it has bytes, times the worker's slowness, within five per cent. What
a worker takes is what ``--part any`` takes (``plan.schedule``). Printed is the time of all over the ideal one, in which
no worker is ever idle; the result goes to ``benchmarks/results/stragglers.json``.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections.abc import Sequence

from benchmarks.machine import ROOT, provenance
from shardmerge.plan.schedule import largest_first, late_part

RESULT = ROOT / "benchmarks" / "results" / "stragglers.json"

# How often an idle worker looks again, in parts of the time of an average part.
_LOOK = 0.05


def simulate(sizes: Sequence[int], slowness: Sequence[float], draw: random.Random, *, again: bool) -> tuple[float, int]:
    """Returns the time of all over the ideal one, and how many parts were made twice."""
    typical = statistics.mean(sizes)
    queue = list(reversed(largest_first(sizes)))
    begun: dict[int, float] = {}
    done: set[int] = set()
    twice: set[int] = set()
    events: list[tuple[float, int, int]] = [(0.0, worker, -1) for worker in range(len(slowness))]
    now = 0.0
    while len(done) < len(sizes):
        now, worker, made = heapq.heappop(events)
        done |= {made} - {-1}
        part = queue.pop() if queue else None
        if part is None and again:
            under_way = {n: now - at for n, at in begun.items() if n not in done and n not in twice}
            part = late_part(under_way, sizes, 1.0, slowness[worker])
            twice |= set() if part is None else {part}
        if part is None:
            heapq.heappush(events, (now + _LOOK * typical, worker, -1))
            continue
        begun.setdefault(part, now)
        heapq.heappush(events, (now + sizes[part] * slowness[worker] * draw.uniform(0.95, 1.05), worker, part))
    return now / (sum(sizes) / sum(1 / slow for slow in slowness)), len(twice)


def main() -> None:
    """Simulates and writes the result."""
    parser = argparse.ArgumentParser(description="Workers that take any part, some of them slow.")
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--slow", type=float, default=0.1)
    parser.add_argument("--times", type=float, default=4.0)
    parser.add_argument("--draws", type=int, default=20)
    given = parser.parse_args()
    found: dict[str, object] = {**provenance(), **vars(given)}
    for again in (False, True):
        ratios, twice = [], []
        for seed in range(given.draws):
            draw = random.Random(seed)
            slow = round(given.workers * given.slow)
            slowness = [given.times] * slow + [1.0] * (given.workers - slow)
            draw.shuffle(slowness)
            sizes = [draw.randint(900_000_000, 1_035_000_000) for _ in range(given.parts)]
            ratio, more = simulate(sizes, slowness, draw, again=again)
            ratios.append(round(ratio, 3))
            twice.append(more)
        key = "late parts made again" if again else "each part made once"
        found[key] = {"median": statistics.median(ratios), "most": max(ratios), "made twice at most": max(twice)}
        print(key, json.dumps(found[key]))
    RESULT.write_text(json.dumps({"schema": 1, **found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
