"""Measures shardmerge beside the floor of the machine and beside what people use today.

    python -m benchmarks.run [--cases zero2-1g,rename] [--size 2GiB] [--rounds 5] [--cold]

All contenders of a case run in turn, round after round, each a whole process measured from outside. Results go to
``benchmarks/results``, and ``docs/benchmarks.md`` is written from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks import report
from benchmarks.cases import DEFAULT, Case, case, resized
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.measuring import run_case
from benchmarks.peers import environment

RESULTS = ROOT / "benchmarks" / "results"


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A directory for gigabytes, removed whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        yield Path(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks; see docs/benchmarks.md.")
    parser.add_argument("--cases", default=",".join(DEFAULT), help="keys, comma-separated; default: %(default)s")
    parser.add_argument("--size", default="", help="another size for the chosen cases: 512MiB, 2GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run")
    parser.add_argument("--no-peers", action="store_true", help="shardmerge and the floor alone")
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where 14 GB of files may lie meanwhile")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page is written for the default alone")
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    return parser.parse_args()


def _chosen(given: argparse.Namespace) -> list[Case]:
    keys = [key for key in given.cases.split(",") if key]
    try:
        return [case(resized(key, given.size) if given.size else key) for key in keys]
    except ValueError as error:
        sys.exit(str(error))


def _peers(chosen: Case) -> dict[str, str]:
    """Returns the versions of what is measured in an environment of its own."""
    found: dict[str, str] = {}
    wanted = {"DeepSpeed": (environment.deepspeed, "deepspeed"), "mergekit": (environment.mergekit, "mergekit")}
    for name, (build, package) in wanted.items():
        if name in chosen.peers:
            with suppress(subprocess.CalledProcessError):  # then the result says that it is missing
                found |= environment.versions(build(), [package])
    return found


def main() -> None:
    """Measures, writes the results, and renders the page."""
    given = _arguments()
    as_installed()
    given.results.mkdir(parents=True, exist_ok=True)
    for chosen in _chosen(given):
        print(chosen.title, flush=True)
        with scratch(given.scratch) as folder:
            card = machine_card(folder, {} if given.no_peers else _peers(chosen), given.note)
            seen = run_case(chosen, folder, given.rounds, cold=given.cold, peers=not given.no_peers)
        name = f"{chosen.key}-cold.json" if given.cold else f"{chosen.key}.json"
        result = {**provenance(), "machine": card, **seen}
        (given.results / name).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if given.results == RESULTS:
        report.write()


if __name__ == "__main__":
    main()
