"""Measures the bare loop of a cast (read, cast, checksum, write) to choose how the engine runs it.

    python -m benchmarks.loops [--gib 2] [--rounds 9] [--workers 1 2 4 ...] [--scratch DIRECTORY] [--note TEXT]

No plan, no names, no receipt: what is left is what threads, processes, one output file or one each, mapped sources, and
the lengths of tiles and writes cost by themselves. All ways run in turn, round after round, from a warm page cache and
without sync. The result goes to ``benchmarks/results/loops.json``; decisions 19 and 27 rest on it.

Who measures the engine compares it with ``once(Way(16, "processes", own=True), source, folder)`` in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
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
from shardmerge.storage.limits import usable_cpus

RESULT = ROOT / "benchmarks" / "results" / "loops.json"
_F32, _BF16 = DTYPES["F32"], DTYPES["BF16"]
_MIB = 1 << 20
_MADV_POPULATE_READ = 22  # linux/mman.h

Kind = Literal["threads", "processes"]
_KINDS: tuple[Kind, ...] = ("threads", "processes")


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running the loop.

    Attributes
    ----------
    workers, kind
        How many of what.
    own
        Whether each writes a file of its own; else all write one.
    mapped
        Whether tiles are windows of a memory map; else they are read into a buffer.
    tile, write
        Bytes of what is read, and of one call of writing at most.
    """

    workers: int
    kind: Kind = "threads"
    own: bool = False
    mapped: bool = False
    tile: int = 2 * _MIB
    write: int = 2 * _MIB

    @property
    def key(self) -> str:
        """Its name in the result file."""
        words = [f"{self.workers}-{self.kind}", "own" if self.own else "one", "mapped" if self.mapped else "read"]
        words += [f"tile-{self.tile >> 20}"] if self.tile != 2 * _MIB else []
        return "-".join(words + ([f"write-{self.write >> 10}k"] if self.write < self.tile // 2 else []))

    def title(self) -> str:
        """How the page calls it, its number of workers apart."""
        files = f"a file a {'thread' if self.kind == 'threads' else 'process'}" if self.own else "one file"
        return f"{self.kind}, {files}, {'mapped' if self.mapped else 'read'}"


def ways(counts: Sequence[int]) -> list[Way]:
    """Returns all ways for so many workers, and other lengths for two threads."""
    found = [
        Way(n, kind, own, mapped) for kind, own, mapped, n in product(_KINDS, (False, True), (False, True), counts)
    ]
    return list(dict.fromkeys([*found, *LENGTHS]))


LENGTHS = (Way(2), Way(2, tile=_MIB), Way(2, tile=4 * _MIB), Way(2, write=128 << 10))


@dataclass(frozen=True, slots=True)
class _Share:
    """The tiles of a worker, the file they go to, and which tile that begins with."""

    tiles: range
    out: Path
    first: int


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds: by the clock on the wall, and of the CPU (user and system, children included)."""

    wall: float
    cpu: float


def once(way: Way, source: Path, folder: Path) -> Took:
    """Casts a file of float32 to bfloat16, into files of a folder that is there."""
    tiles = source.stat().st_size // way.tile
    started, used = time.monotonic(), _cpu()
    shares = _shares(way, tiles, folder)
    for share in shares if way.own else shares[:1]:
        fd = os.open(share.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.ftruncate(fd, (len(share.tiles) if way.own else tiles) * way.tile // 2)
        os.close(fd)
    (_by_threads if way.kind == "threads" else _by_processes)(way, source, shares)
    return Took(time.monotonic() - started, _cpu() - used)


def _cpu() -> float:
    """Of this process and the children it has waited for."""
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in found)


def _shares(way: Way, tiles: int, folder: Path) -> list[_Share]:
    """Into one file all go side by side; those of a file follow each other, as its tensors do."""
    if not way.own:
        return [_Share(range(worker, tiles, way.workers), folder / "0", 0) for worker in range(way.workers)]
    bounds = [tiles * worker // way.workers for worker in range(way.workers + 1)]
    spans = [range(bounds[worker], bounds[worker + 1]) for worker in range(way.workers)]
    return [_Share(span, folder / str(worker), span.start) for worker, span in enumerate(spans)]


def _by_threads(way: Way, source: Path, shares: list[_Share]) -> None:
    threads = [threading.Thread(target=_work, args=(way, source, share)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _by_processes(way: Way, source: Path, shares: list[_Share]) -> None:
    children = []
    for share in shares:
        child = os.fork()
        if not child:
            code = 1
            try:
                _work(way, source, share)
                code = 0
            finally:  # a child never goes on where its parent does
                os._exit(code)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise RuntimeError("a process failed")


def _work(way: Way, source: Path, share: _Share) -> None:
    """Does every tile of a share: reads it, casts it, takes its checksum, writes it."""
    given, made = memoryview(bytearray(way.tile)), memoryview(bytearray(way.tile // 2))
    fd, target = os.open(source, os.O_RDONLY), os.open(share.out, os.O_WRONLY)
    for tile in share.tiles:
        data = _window(fd, tile * way.tile, way.tile) if way.mapped else given
        if not way.mapped:
            os.preadv(fd, [given], tile * way.tile)
        convert(as_array(data, _F32), as_array(made, _BF16), _F32, _BF16)
        crc32(made)
        for start in range(0, len(made), way.write):
            os.pwrite(target, made[start : start + way.write], (tile - share.first) * len(made) + start)
    os.close(fd)
    os.close(target)


def _window(fd: int, offset: int, nbytes: int) -> memoryview:
    mapping = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=offset)
    mapping.madvise(_MADV_POPULATE_READ)
    return memoryview(mapping)


Seconds = dict[Way, list[Took]]


def measured(folder: Path, gib: int, rounds: int, contenders: Sequence[Way]) -> Seconds:
    """Returns the seconds of every way, round by round; a first round is thrown away."""
    source, out = folder / "source", folder / "out"
    with source.open("wb") as file:
        write_normal(file, (gib << 30) // 4, seed=0)
    seconds: Seconds = {way: [] for way in contenders}
    for number in range(-1, rounds):
        for way in order(contenders, number):
            os.sync()
            out.mkdir()
            took = once(way, source, out)
            shutil.rmtree(out)
            if number >= 0:
                seconds[way].append(took)
        print(f"round {number + 1} of {rounds}", flush=True)
    return seconds


def result(seconds: Seconds, counts: Sequence[int], gib: int, card: dict[str, object]) -> dict[str, object]:
    """Returns the result file."""
    wall, cpu = ({way: [getattr(took, name) for took in found] for way, found in seconds.items()} for name in _CLOCKS)
    return {
        **provenance(),
        "machine": card,
        "title": f"The bare loop: {gib} GiB of float32 to bfloat16",
        "about": f"Read, cast, checksum, write, without a plan or names. {len(wall[LENGTHS[0]])} rounds, warm, "
        "unsynced; ratios are taken in each round. Columns are numbers of workers.",
        "seconds": {way.key: {"wall": _rounded(wall[way]), "cpu": _rounded(cpu[way])} for way in seconds},
        "tables": [
            _by_workers("Wall seconds", wall, counts),
            _by_workers("CPU seconds", cpu, counts),
            _windows("Mapped windows over reading, wall", wall, counts),
            _windows("Mapped windows over reading, CPU", cpu, counts),
            _lengths(wall),
        ],
    }


_CLOCKS = ("wall", "cpu")
_Figures = dict[Way, list[float]]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _by_workers(title: str, seconds: _Figures, counts: Sequence[int]) -> dict[str, object]:
    """The seconds of so many workers, a row a way."""
    rows = []
    for kind, own, mapped in product(_KINDS, (False, True), (False, True)):
        line = [Way(n, kind, own, mapped) for n in counts]
        rows.append([line[0].title(), *(_shown(spread(seconds[way])) for way in line)])
    return {"title": title, "columns": ["", *map(str, counts)], "rows": rows}


def _windows(title: str, seconds: _Figures, counts: Sequence[int]) -> dict[str, object]:
    """Windows over reading, all else equal: above 1, reading is faster."""
    rows = []
    for kind, own in product(_KINDS, (False, True)):
        pairs = [(Way(n, kind, own, mapped=True), Way(n, kind, own)) for n in counts]
        name = pairs[0][1].title().removesuffix(", read")
        rows.append([name, *(_shown(ratios(seconds[one], seconds[other])) for one, other in pairs)])
    return {"title": title, "about": "Above 1, reading is faster.", "columns": ["", *map(str, counts)], "rows": rows}


def _lengths(seconds: _Figures) -> dict[str, object]:
    """Other lengths of tiles and writes, over the usual ones."""
    rows = []
    for way in LENGTHS:
        calls = f", written by {way.write >> 10} KiB" if way.write < way.tile // 2 else ""
        figures = spread(seconds[way]), ratios(seconds[way], seconds[LENGTHS[0]])
        rows.append([f"tiles of {way.tile >> 20} MiB{calls}", *map(_shown, figures)])
    return {"title": "Lengths, two threads, one file, read", "columns": ["", "wall s", "x the first row"], "rows": rows}


def _shown(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def _counts() -> list[int]:
    """1, 2, 4, ... up to the CPUs that this process may use, these included."""
    most = max(2, usable_cpus())
    return sorted({most, *(1 << power for power in range(most.bit_length()))})


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=int, default=2, help="of float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="+", default=_counts(), help="how many of them, each in turn")
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where twice the size is free")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        seconds = measured(Path(folder), given.gib, given.rounds, ways(given.workers))
    found = result(seconds, given.workers, given.gib, machine_card(given.scratch, note=given.note))
    given.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
