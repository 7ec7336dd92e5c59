"""Measures a case: everyone in turn, round after round, each a whole process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from benchmarks import floor
from benchmarks.cases import Case
from benchmarks.contender import Contender
from benchmarks.harness import Measured, answer, measure, order, succeed, thinned
from benchmarks.machine import ROOT
from benchmarks.memory_group import memory_group
from benchmarks.page_cache import forget
from benchmarks.peers.commands import ENV
from shardmerge.bench.figures import spread
from shardmerge.tensors import Extent

WARM = "warm: one round before the measured ones is thrown away"
# Of every run; what could not be had in one of them has no spread.
FIGURES = (
    "wall",
    "cpu",
    "peak",
    "anonymous",
    "mapped",
    "cgroup",
    "written",
    "rchar",
    "wchar",
    "read_bytes",
    "write_bytes",
)


def run_case(case: Case, scratch: Path, rounds: int, *, cold: bool = False, peers: bool = True) -> dict[str, object]:
    """Measures a case and returns its result as JSON values.

    Parameters
    ----------
    scratch
        An empty directory for the input and two outputs.
    rounds
        How often each contender runs.
    cold
        Whether the page cache is emptied before each run.
    peers
        Whether anyone but shardmerge and the floor takes part.
    """
    source, reference = scratch / "source", scratch / "reference"
    case.prepare(source)
    ranges = floor.needed(source / name for name in case.sources)
    contenders, missing = _contenders(case, source, reference, ranges, peers=peers)
    checks, failed = _warm_up(contenders, source / case.sources[0], scratch)
    contenders = [contender for contender in contenders if contender.key not in failed]
    runs: dict[str, list[dict[str, object]]] = {contender.key: [] for contender in contenders}
    curves: dict[str, list[tuple[float, int, int]]] = {}
    cache = WARM
    for number in range(rounds):
        for place, contender in enumerate(order(contenders, number)):
            if cold:
                cache = forget([source, reference])
            done, figures = _run(contender, scratch / "out")
            runs[contender.key].append({"round": number, "place": place, **figures})
            curves.setdefault(contender.key, thinned(done.curve))
        print(f"  round {number + 1} of {rounds}: " + _line(runs), flush=True)
    return {
        "case": {"key": case.key, "title": case.title, "about": case.about},
        "cache": cache,
        "rounds": rounds,
        "checks": checks,
        "missing": [*missing, *failed.values()],
        "needed_bytes": sum(extent.nbytes for extent in ranges),
        "output_bytes": sum(path.stat().st_size for path in reference.glob("*.safetensors")),
        "contenders": [_summary(contender, runs[contender.key], curves) for contender in contenders],
    }


def _contenders(
    case: Case, source: Path, reference: Path, ranges: list[Extent], *, peers: bool
) -> tuple[list[Contender], list[str]]:
    """Returns who takes part, and who cannot and why."""
    found, missing = case.ours(source), []
    for name, make in case.peers.items() if peers else ():
        try:
            found += make(source)
        except (subprocess.CalledProcessError, PackageNotFoundError) as error:
            missing.append(f"{name}: could not be made ready ({type(error).__name__}: {error})")
    return found + floor.floors(ranges, reference, source.with_name("read.sh"), casts=case.casts), missing


def _warm_up(contenders: Sequence[Contender], source: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """Runs everyone once; keeps our output as the reference, and compares what the others wrote.

    Returns what was found equal, and which peers failed, with their last words.
    """
    checks, failed = [], {}
    for contender in contenders:
        out = scratch / ("out" if contender.key != "shardmerge" else "reference")
        done = _measure(contender, out)
        if done.code and contender.kind == "peer":
            last = (done.stderr.strip().splitlines() or [""])[-1]
            failed[contender.key] = f"{contender.title}: exit code {done.code}, {last[:200]}"
            shutil.rmtree(out, ignore_errors=True)
            continue
        succeed(done)
        if contender.same_as:
            truth = scratch / "reference" if contender.same_as == "ours" else source
            both: list[str | Path] = [sys.executable, "-m", "shardmerge", "diff", truth, out, "--json"]
            if not answer(measure(both, cwd=ROOT))["equal"]:
                raise RuntimeError(f"{contender.title} has written other tensors than {contender.same_as}")
            other = "shardmerge writes" if contender.same_as == "ours" else "the input holds"
            checks.append(f"{contender.title} writes the tensors that {other}, bit by bit")
        if contender.key != "shardmerge":
            shutil.rmtree(out)
    return checks, failed


def _run(contender: Contender, out: Path) -> tuple[Measured, dict[str, object]]:
    os.sync()  # whoever ran before has no share in our waiting for the disk
    load = os.getloadavg()[0]
    with memory_group() as group:
        done = succeed(_measure(contender, out, group.procs if group else ""))
        taken = group.peak() if group else None
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    figures: dict[str, object] = {
        "wall": round(done.wall, 4),
        "cpu": round(done.cpu, 4),
        "user": round(done.user, 4),
        "system": round(done.system, 4),
        "peak": done.peak,
        "anonymous": done.anonymous,
        "mapped": done.mapped,
        "cgroup": taken,
        "written": written,
        **{name: done.io.get(name) for name in ("rchar", "wchar", "read_bytes", "write_bytes")},
        "load": round(load, 2),
    }
    if contender.kind == "ours":
        told = answer(done)
        figures |= {"planned_peak": told["planned_peak"], "bytes_read": told["bytes_read"]}
    return done, figures


def _measure(contender: Contender, out: Path, group: str = "") -> Measured:
    return measure(contender.command(out), cwd=ROOT, env=ENV, group=group)


def _line(runs: dict[str, list[dict[str, object]]]) -> str:
    return ", ".join(f"{key} {figures[-1]['wall']:.2f} s" for key, figures in runs.items())


def _summary(
    contender: Contender, runs: list[dict[str, object]], curves: dict[str, list[tuple[float, int, int]]]
) -> dict[str, object]:
    names = (*FIGURES, "planned_peak", "bytes_read") if contender.kind == "ours" else FIGURES
    return {
        "key": contender.key,
        "title": contender.title,
        "kind": contender.kind,
        "synced": contender.synced,
        "command": contender.shown,
        **{name: _spread([run[name] for run in runs]) for name in names},
        "curve": curves[contender.key] if contender.kind != "floor" else [],
        "runs": runs,
    }


def _spread(values: Sequence[object]) -> dict[str, float]:
    return {} if None in values else spread([float(str(value)) for value in values])
