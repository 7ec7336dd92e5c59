"""Measures what ``--sha256`` costs: the same conversion with and without it, in turn.

    python -m benchmarks.digests [--cases zero2-2g,rename-1g] [--rounds 7] [--scratch DIRECTORY]

Each with sync and with ``--no-sync``, each a whole process; a first round is thrown away. Results go to
``benchmarks/results/digests.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.cases import case
from benchmarks.contender import Contender
from benchmarks.harness import measure, order, succeed
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from shardmerge.bench.figures import ratios, spread

RESULT = ROOT / "benchmarks" / "results" / "digests.json"
_FIGURES = ("wall", "cpu", "peak")


def measure_case(key: str, folder: Path, rounds: int) -> dict[str, object]:
    """Measures one case below a directory and returns seconds and bytes, and the ratios with to without."""
    found, source = case(key), folder / "source"
    found.prepare(source)
    plain = found.ours(source)
    commands = {one.key: (one, []) for one in plain} | {f"{one.key} --sha256": (one, ["--sha256"]) for one in plain}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(-1, rounds):
        for name in order(list(commands), number):
            figures = _run(*commands[name], folder / "out")
            if number >= 0:
                runs[name].append(figures)
        if number >= 0:
            print(", ".join(f"{name} {seen[-1]['wall']:.2f} s" for name, seen in runs.items()), flush=True)
    return {
        "title": found.title,
        "runs": {name: {key: spread([run[key] for run in seen]) for key in _FIGURES} for name, seen in runs.items()},
        "ratios": {
            one.key: {
                key: ratios([run[key] for run in runs[f"{one.key} --sha256"]], [run[key] for run in runs[one.key]])
                for key in ("wall", "cpu")
            }
            for one in plain
        },
    }


def _run(one: Contender, more: list[str], out: Path) -> dict[str, float]:
    os.sync()  # whoever ran before has no share in our waiting for the disk
    done = succeed(measure([*one.command(out), *more], cwd=ROOT))
    shutil.rmtree(out)
    return {"wall": done.wall, "cpu": done.cpu, "peak": float(done.peak)}


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description="With --sha256 and without.")
    parser.add_argument("--cases", default="zero2-2g,rename-1g")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where twice the size is free")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    given = parser.parse_args()
    as_installed()
    given.scratch.mkdir(parents=True, exist_ok=True)
    cases = {}
    for key in given.cases.split(","):
        with tempfile.TemporaryDirectory(prefix="digests-", dir=given.scratch) as name:
            cases[key] = measure_case(key, Path(name), given.rounds)
            print(key, json.dumps(cases[key]["ratios"]), flush=True)
    card = machine_card(given.scratch, None, given.note)
    result = {**provenance(), "machine": card, "rounds": given.rounds, "cases": cases}
    given.result.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
