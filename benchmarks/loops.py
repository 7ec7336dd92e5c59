"""Measures the bare loop of a cast (read, cast, checksum, write) to choose how the engine runs it.

    python -m benchmarks.loops [--gib 2] [--rounds 9] [--scratch DIRECTORY] [--note TEXT]

No plan, no names, no receipt: what is left is what threads, processes, mapped sources, and the lengths of tiles and
writes cost by themselves. All ways run in turn, round after round, from a warm page cache and without sync. The result
goes to ``benchmarks/results/loops.json``; decision 19 rests on it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.harness import order
from benchmarks.machine import ROOT, machine_card, provenance
from benchmarks.synthetic import write_normal
from shardmerge.bench.figures import ratios, spread
from shardmerge.dtypes import DTYPES
from shardmerge.execute.checksum import crc32
from shardmerge.ops.arrays import as_array
from shardmerge.ops.fast_casts import convert

RESULT = ROOT / "benchmarks" / "results" / "loops.json"
_F32, _BF16 = DTYPES["F32"], DTYPES["BF16"]
_MIB = 1 << 20
_MADV_POPULATE_READ = 22  # linux/mman.h


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running the loop; lengths in bytes, ``tile`` of what is read, ``write`` of one call at most."""

    key: str
    workers: int
    kind: Literal["threads", "processes"] = "threads"
    mapped: bool = False
    tile: int = 2 * _MIB
    write: int = 2 * _MIB

    def title(self) -> str:
        """How the page calls it."""
        workers = f"{self.workers} {self.kind}" if self.workers > 1 else "1 thread"
        reads = "mapped" if self.mapped else "read"
        calls = f", written by {self.write >> 10} KiB" if self.write < self.tile // 2 else ""
        return f"{workers}, tiles of {self.tile >> 20} MiB {reads}{calls}"


WAYS = (
    Way("threads", 2),
    Way("one", 1),
    Way("processes", 2, "processes"),
    Way("mapped", 2, mapped=True),
    Way("mapped-processes", 2, "processes", mapped=True),
    Way("tile-1", 2, tile=_MIB),
    Way("tile-4", 2, tile=4 * _MIB),
    Way("write-128k", 2, write=128 << 10),
)


def once(way: Way, source: Path, out: Path) -> float:
    """Casts a file of float32 to one of bfloat16 and returns the seconds."""
    tiles = source.stat().st_size // way.tile
    started = time.monotonic()
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.ftruncate(target, tiles * way.tile // 2)
    shares = [range(worker, tiles, way.workers) for worker in range(way.workers)]
    (_by_threads if way.kind == "threads" else _by_processes)(way, source, target, shares)
    os.close(target)
    return time.monotonic() - started


def _by_threads(way: Way, source: Path, target: int, shares: list[range]) -> None:
    threads = [threading.Thread(target=_work, args=(way, source, target, share)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _by_processes(way: Way, source: Path, target: int, shares: list[range]) -> None:
    children = []
    for share in shares:
        child = os.fork()
        if not child:
            _work(way, source, target, share)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise RuntimeError("a process failed")


def _work(way: Way, source: Path, target: int, share: range) -> None:
    """Does every tile of a share: reads it, casts it, takes its checksum, writes it."""
    given, made = memoryview(bytearray(way.tile)), memoryview(bytearray(way.tile // 2))
    fd = os.open(source, os.O_RDONLY)
    for tile in share:
        data = _window(fd, tile * way.tile, way.tile) if way.mapped else given
        if not way.mapped:
            os.preadv(fd, [given], tile * way.tile)
        convert(as_array(data, _F32), as_array(made, _BF16), _F32, _BF16)
        crc32(made)
        for start in range(0, len(made), way.write):
            os.pwrite(target, made[start : start + way.write], tile * len(made) + start)
    os.close(fd)


def _window(fd: int, offset: int, nbytes: int) -> memoryview:
    mapping = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=offset)
    mapping.madvise(_MADV_POPULATE_READ)
    return memoryview(mapping)


def measured(folder: Path, gib: int, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every way, round by round; a first round is thrown away."""
    source, out = folder / "source", folder / "out"
    with source.open("wb") as file:
        write_normal(file, (gib << 30) // 4, seed=0)
    seconds: dict[str, list[float]] = {way.key: [] for way in WAYS}
    for number in range(-1, rounds):
        for way in order(WAYS, number):
            os.sync()
            took = once(way, source, out)
            out.unlink()
            if number >= 0:
                seconds[way.key].append(round(took, 4))
        print(f"round {number + 1} of {rounds}", flush=True)
    return seconds


def result(seconds: dict[str, list[float]], gib: int, card: dict[str, object]) -> dict[str, object]:
    """Returns the result file."""
    first = seconds[WAYS[0].key]
    rows = []
    for way in WAYS:
        took, beside = spread(seconds[way.key]), ratios(seconds[way.key], first)
        rows.append([way.title(), *(_shown(figures) for figures in (took, beside))])
    return {
        **provenance(),
        "machine": card,
        "title": f"The bare loop: {gib} GiB of float32 to bfloat16",
        "about": "Read, cast, checksum, write, without a plan or names: seconds, and their ratio to the first row in "
        f"the same round. {len(first)} rounds, warm, unsynced.",
        "seconds": seconds,
        "tables": [{"columns": ["", "wall s", "x the first row"], "rows": rows}],
    }


def _shown(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=int, default=2, help="of float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where twice the size is free")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        seconds = measured(Path(folder), given.gib, given.rounds)
    found = result(seconds, given.gib, machine_card(given.scratch, note=given.note))
    given.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
