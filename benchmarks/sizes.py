"""Measures that memory does not grow with the checkpoint: a copy and a cast, from half a GiB to 32 GiB.

    python -m benchmarks.sizes [--sizes 0.5,2,8,32] [--scratch DIRECTORY]

Holes stand for the values, since only memory is asked for; what is written is real, and deleted at once. Each runs
freely and in a memory control group of 128 MiB, page cache included. The result is ``results/sizes.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.contender import program
from benchmarks.harness import answer, measure
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.memory_group import memory_group
from benchmarks.run import RESULTS, scratch
from benchmarks.synthetic import llama_of, write_safetensors, write_zero
from shardmerge.storage.writing import free_bytes

LIMIT = 128 << 20
_GIB, _MIB = 1 << 30, 1 << 20
Row = dict[str, object]


def _cast(folder: Path, nbytes: int) -> list[str | Path]:
    write_zero(folder, llama_of(nbytes).tensors(), stage=2, world=2, fill=False)
    return ["--dtype", "bfloat16"]


def _copy(folder: Path, nbytes: int) -> list[str | Path]:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", llama_of(2 * nbytes).tensors())
    return []


JOBS: dict[str, tuple[str, Callable[[Path, int], list[str | Path]]]] = {
    "copy": ("copy: a safetensors file of bf16", _copy),
    "cast": ("cast: ZeRO-2 of 2 ranks, fp32 to bf16", _cast),
}


def measure_size(job: str, nbytes: int, folder: Path) -> Iterator[Row]:
    """Writes the input and yields what a conversion took: freely, then in a group of 128 MiB where one can be made."""
    options = JOBS[job][1](folder / "source", nbytes)
    for limit in (0, LIMIT):
        with memory_group(limit) as group:
            if limit and group is None:
                continue
            command = [*program(), "convert", folder / "source", folder / "out", *options, "--json"]
            done = measure(command, cwd=ROOT, group=group.procs if group else "")
            found = answer(done)
            shutil.rmtree(folder / "out")
            yield {
                "job": job,
                "gib": nbytes / _GIB,
                "limit": limit,
                "peak": done.peak,
                "anonymous": done.anonymous,
                "mapped": done.mapped,
                "cgroup": group.peak() if group else None,
                "planned_peak": found["planned_peak"],
                "bytes_read": found["bytes_read"],
                "bytes_written": found["bytes_written"],
                "wall": round(done.wall, 2),
            }
    shutil.rmtree(folder / "source")


def result(runs: Sequence[Row], card: Mapping[str, object]) -> dict[str, object]:
    """Returns the result file: the runs, a table and a plot."""
    columns = ["", "GiB in", "limit", "peak MiB", "anonymous", "file pages", "with page cache", "planned", "wall s"]
    return {
        **provenance(),
        "machine": card,
        "title": "Memory against size",
        "about": "Whole processes, start-up included, synced; one run each. The input is holes; the output is written.",
        "runs_of_sizes": list(runs),
        "tables": [{"columns": columns, "rows": [_cells(run) for run in runs]}],
        "plots": [
            {
                "key": "memory",
                "title": "Peak memory of shardmerge against the size of the input",
                "axes": ["GiB of input, doubling", "resident MiB"],
                "doubling": True,
                "series": [
                    {"label": JOBS[job][0] + (", in 128 MiB" if limit else ""), "points": _points(runs, job, limit)}
                    for job in JOBS
                    for limit in (0, LIMIT)
                    if _points(runs, job, limit)
                ],
            }
        ],
    }


def _cells(run: Row) -> list[object]:
    sizes = ("peak", "anonymous", "mapped", "cgroup", "planned_peak")
    mebibytes = [None if run[name] is None else round(float(str(run[name])) / _MIB, 1) for name in sizes]
    return [run["job"], run["gib"], "128 MiB" if run["limit"] else "", *mebibytes, run["wall"]]


def _points(runs: Sequence[Row], job: str, limit: int) -> list[list[float]]:
    found = [run for run in runs if (run["job"], run["limit"]) == (job, limit)]
    return [[float(str(run["gib"])), float(str(run["peak"])) / _MIB] for run in found]


def main() -> None:
    """Measures, writes the results, and renders the page."""
    parser = argparse.ArgumentParser(description="Memory against size.")
    parser.add_argument("--sizes", default="0.5,2,8,32", help="GiB of input, comma-separated")
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where the largest output may lie")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    as_installed()
    sizes = [int(float(size) * _GIB) for size in given.sizes.split(",")]
    with scratch(given.scratch) as folder:
        if free_bytes(folder) < max(sizes) + _GIB:
            sys.exit(f"{max(sizes) + _GIB:,} bytes are needed on the disk of {given.scratch}")
        runs = []
        for job in JOBS:
            for size in sizes:
                for run in measure_size(job, size, folder):
                    runs.append(run)
                    print(json.dumps(run), flush=True)
        found = result(runs, machine_card(folder, None, given.note))
    (given.results / "sizes.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if given.results == RESULTS:
        report.write()


if __name__ == "__main__":
    main()
