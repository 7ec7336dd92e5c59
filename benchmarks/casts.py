"""Measures every cast beside torch on the CPU: GB/s of input, on the same cores.

    python -m benchmarks.casts [--rounds 7] [--pairs F32:BF16,...]

One thread and two, each with blocks of its own; torch with one thread of its own inside each. A ``tile`` has 2 MiB on
its larger side, as in a conversion, and stays in the cache; ``memory`` is the same from 32 tiles in turn, which hardly
any cache holds; ``small`` is a block of 128 KiB. ``shardmerge`` is the whole cast with its count of overflows, which
torch does not make; ``plain`` is the same without numkong. Takes about 3 minutes; results go to
``benchmarks/results/casts.json``.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle, permutations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.machine import ROOT, machine_card, provenance
from shardmerge.dtypes import DTYPES, DType
from shardmerge.execute.checksum import crc32
from shardmerge.ops import fast_casts
from shardmerge.ops.arrays import numpy_dtype
from shardmerge.ops.casts import CASTABLE, Cast

RESULT = ROOT / "benchmarks" / "results" / "casts.json"
# Bytes on the larger side, and how many blocks are cast in turn.
BLOCKS = {"memory": (2 << 20, 32), "tile": (2 << 20, 1), "small": (128 << 10, 1)}
THREADS = (1, 2)
PAIRS = tuple(
    (source, target)
    for source, target in permutations(sorted(CASTABLE, key=lambda name: -DTYPES[name].itemsize), 2)
    if "F64" not in (source, target)
)

# Seconds that one contestant is timed in one round.
_SLICE = 0.015

# Does the work of a thread once.
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contest:
    """One cast of blocks of one size, in several ways."""

    source: DType
    target: DType
    nbytes: int
    blocks: int

    @property
    def count(self) -> int:
        """Elements of a block."""
        return self.nbytes // max(self.source.itemsize, self.target.itemsize)

    def works(self) -> dict[str, Work]:
        """Returns the work of a thread for each contestant, on arrays of its own; the values are those of weights."""
        rng = np.random.default_rng(0)
        weights = rng.standard_normal(self.count, np.float32) * np.float32(0.05)
        given = np.tile(weights.astype(numpy_dtype(self.source)), self.blocks).reshape(self.blocks, -1)
        out = np.empty(self.count, numpy_dtype(self.target))
        there = torch.from_numpy(given.view(np.uint8)).view(getattr(torch, self.source.torch))
        made = torch.empty(self.count, dtype=getattr(torch, self.target.torch))
        cast = Cast(self.source, self.target)
        here, theirs = cycle(given), cycle(there.unbind())
        ours = lambda: cast.apply(None, [next(here)], 0, out)  # noqa: E731
        return {"torch": lambda: made.copy_(next(theirs)), "shardmerge": ours, "plain": ours}


def speeds(contest: Contest, threads: int, rounds: int) -> dict[str, list[float]]:
    """Returns GB/s of input of each contestant in each round, in turn."""
    every = [contest.works() for _ in range(threads)]
    nbytes = contest.count * contest.source.itemsize
    found: dict[str, list[float]] = {name: [] for name in every[0]}
    repeats = {}
    for turn in range(rounds + 1):
        for name, figures in found.items():
            works = [each[name] for each in every]
            with _roads(plain=name == "plain"):
                if not turn:  # tables are made, kernels compared, pages touched
                    _seconds(works, 1)
                    repeats[name] = max(1, int(_SLICE / _seconds(works, 1)))
                else:
                    taken = _seconds(works, repeats[name])
                    figures.append(threads * repeats[name] * nbytes / taken / 1e9)
    return found


class _roads:  # noqa: N801  # read as a verb
    """Hides numkong meanwhile, if asked to."""

    def __init__(self, *, plain: bool) -> None:
        self._plain = plain
        self._kept = fast_casts.numkong

    def __enter__(self) -> None:
        if self._plain:
            vars(fast_casts)["numkong"] = lambda: None

    def __exit__(self, *_: object) -> None:
        vars(fast_casts)["numkong"] = self._kept


def _seconds(works: list[Work], repeats: int) -> float:
    """Returns the time from when all threads are ready until the last one is done."""
    ready = threading.Barrier(len(works) + 1)

    def labour(work: Work) -> None:
        ready.wait()
        for _ in range(repeats):
            work()

    threads = [threading.Thread(target=labour, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def _range(values: list[float]) -> dict[str, float]:
    return {"median": round(median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def rows(pairs: tuple[tuple[str, str], ...], rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the figures of every pair, size of block and number of threads; ratios are taken round by round."""
    for source, target in pairs:
        for block, (nbytes, blocks) in BLOCKS.items():
            for threads in THREADS:
                found = speeds(Contest(DTYPES[source], DTYPES[target], nbytes, blocks), threads, rounds)
                ratios = [ours / theirs for ours, theirs in zip(found["shardmerge"], found["torch"], strict=True)]
                yield {
                    "source": source,
                    "target": target,
                    "block": block,
                    "threads": threads,
                    **{name: _range(values) for name, values in found.items()},
                    "ratio": _range(ratios),
                }


def checksums(rounds: int) -> dict[str, dict[str, float]]:
    """Returns GB/s a thread of the CRC-32 of a tile, by zlib and as the engine takes it."""
    data = np.random.default_rng(0).bytes(BLOCKS["tile"][0])
    works: dict[str, Work] = {"zlib": lambda: zlib.crc32(data), "shardmerge": lambda: crc32(data)}
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(20 * len(data) / _seconds([work], 20) / 1e9)
    return {name: _range(values) for name, values in found.items()}


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return "not installed"


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description="Speed of casts beside torch on the CPU.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", default="", help="SOURCE:TARGET,... Default: all 42.")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pairs = tuple((a, b) for a, _, b in (one.partition(":") for one in given.pairs.split(",") if one)) or PAIRS
    card = machine_card(Path.cwd(), None, given.note) | {name: _version(name) for name in ("numkong", "zlib-ng")}
    found = []
    for row in rows(pairs, given.rounds):
        found.append(row)
        speed = {name: row[name]["median"] for name in ("torch", "shardmerge", "plain", "ratio")}
        print(f"{row['source']:12}{row['target']:12}{row['block']:6}{row['threads']}", json.dumps(speed), flush=True)
    sums = checksums(given.rounds)
    print("CRC-32", json.dumps(sums))
    result = {**provenance(), "machine": card, "rounds": given.rounds, "rows": found, "crc32": sums}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
