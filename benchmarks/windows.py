"""Measures ``--io mmap`` against ``--io pread`` on the engine: threads of one process, and processes with a half each.

    python -m benchmarks.windows [--gib 1] [--rounds 9] [--scratch DIRECTORY] [--note TEXT]

Two files of float32 are cast to bfloat16 or kept as they are, by whole runs of the command, start-up included, without
sync and from a warm page cache. The result goes to ``benchmarks/results/windows.json``; decision 27 rests on it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.harness import measure, order, succeed
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.synthetic import write_safetensors
from shardmerge.bench.figures import ratios, spread

RESULT = ROOT / "benchmarks" / "results" / "windows.json"
JOBS = {"cast": ("--dtype", "bfloat16"), "copy": ()}
CASES = {
    "one thread": (1, 1),
    "two threads": (1, 2),
    "two processes of one thread": (2, 1),
    "two processes of two threads": (2, 2),
}
IO = ("pread", "mmap")
_TENSOR = (8192, 1024)  # 32 MiB: a matrix of a model, not a tile


@dataclass(frozen=True, slots=True)
class Run:
    """A job, how many processes of how many threads do it, and how they read."""

    job: str
    case: str
    io: str

    def command(self, source: Path, out: Path) -> list[str]:
        """Returns what a shell does: all processes at once, and it fails where one fails."""
        processes, workers = CASES[self.case]
        parts = [source] if processes == 1 else sorted(source.glob("*.safetensors"))
        options = (*JOBS[self.job], "--io", self.io, "--workers", workers, "--no-sync", "-q")
        shell = shlex.join([sys.executable, "-m", "shardmerge", "convert"])
        lines = [f"{shell} {_words(part, out / part.stem, *options)} & p{n}=$!" for n, part in enumerate(parts)]
        waits = [f"wait $p{n} || exit" for n in range(len(parts))]
        return ["sh", "-c", "\n".join([*lines, *waits])]


def _words(*words: object) -> str:
    return shlex.join(map(str, words))


RUNS = tuple(Run(*run) for run in product(JOBS, CASES, IO))


def write_source(folder: Path, nbytes: int) -> None:
    """Writes a sharded model of two files of the same size, ``nbytes`` of float32 in all."""
    folder.mkdir()
    each = max(1, nbytes // 2 // (4 * _TENSOR[0] * _TENSOR[1]))
    index: dict[str, str] = {}
    for part in (1, 2):
        file = f"model-{part:05}-of-00002.safetensors"
        shapes = {f"layers.{part}.{number}.weight": _TENSOR for number in range(each)}
        write_safetensors(folder / file, shapes, "F32", fill=True, seed=part)
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), "utf-8")


def measured(folder: Path, nbytes: int, rounds: int) -> dict[Run, list[dict[str, float]]]:
    """Returns wall and CPU seconds of every run, round by round; a first round is thrown away."""
    source, out = folder / "source", folder / "out"
    write_source(source, nbytes)
    found: dict[Run, list[dict[str, float]]] = {run: [] for run in RUNS}
    for number in range(-1, rounds):
        for run in order(RUNS, number):
            os.sync()
            out.mkdir()
            done = succeed(measure(run.command(source, out), cwd=ROOT))
            shutil.rmtree(out)
            if number >= 0:
                found[run].append({"wall": round(done.wall, 4), "cpu": round(done.cpu, 4)})
        print(f"round {number + 1} of {rounds}", flush=True)
    return found


def result(found: dict[Run, list[dict[str, float]]], gib: float, card: dict[str, object]) -> dict[str, object]:
    """Returns the result file."""
    rows, rounds = [], len(found[RUNS[0]])
    for job, case in product(JOBS, CASES):
        read, windows = (found[Run(job, case, io)] for io in IO)
        row = [f"{job}, {case}"]
        for clock in ("wall", "cpu"):
            ours, theirs = ([figures[clock] for figures in runs] for runs in (windows, read))
            row += [_shown(spread(theirs)), _shown(ratios(ours, theirs))]
        rows.append(row)
    return {
        **provenance(),
        "machine": card,
        "title": f"Windows of the engine: {gib:g} GiB of float32",
        "about": "Cast to bfloat16, or copied; whole commands, start-up included. Seconds of `--io pread`, and how "
        f"many times as long `--io mmap` takes: above 1, reading is faster. {rounds} rounds, warm, unsynced.",
        "runs": [{"job": run.job, "case": run.case, "io": run.io, "rounds": seen} for run, seen in found.items()],
        "tables": [{"columns": ["", "wall s", "x with mmap", "CPU s", "x with mmap"], "rows": rows}],
    }


def _shown(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1, help="of float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where three times the size is free")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    given = parser.parse_args()
    as_installed()
    given.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        found = measured(Path(folder), round(given.gib * (1 << 30)), given.rounds)
    card = machine_card(given.scratch, note=given.note)
    given.result.write_text(json.dumps(result(found, given.gib, card), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
