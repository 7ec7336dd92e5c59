"""What a run is going to do, in three lines, and what it did, in three lines or as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.plan import explain
from shardmerge.plan.clones import moved
from shardmerge.plan.tables import counted, human_bytes

if TYPE_CHECKING:
    from shardmerge.api import Options, Prepared, Result
    from shardmerge.plan.value import Plan

# Sources that are named one by one: a merge can have dozens.
_MOST_NAMED = 6


def intention(prepared: Prepared, out: Path) -> str:
    """Returns what a run will do: what is made and where, of which sources, with what."""
    plan, how = prepared.plan, prepared.how
    named = [f"{source.name} ({source.kind})" for source in plan.sources]
    more = [f"{len(named) - _MOST_NAMED + 1} more"] if len(named) > _MOST_NAMED else []
    processes = f" in {how.processes} processes" if how.processes > 1 else ""
    return (
        f"{plan.target} -> {shown_path(out)}: {_size(plan)}\n"
        f"from {', '.join([*named[: _MOST_NAMED - len(more)], *more])}\n"
        f"planned peak {_mebibytes(how.peak)}, {how.workers} workers{processes}"
    )


def summary(result: Result, prepared: Prepared, options: Options, seconds: float) -> Iterator[str]:
    """Yields what a run did: where the result is, how it was made and at what cost, and what to do next."""
    place = shown_path(result.path)
    yield f"published {place}: {_size(result.plan)}"
    yield ", ".join(_made(result, prepared, options, seconds)) if result.made else _kept(result)
    yield f"next: shardmerge verify {_quoted(place)}"
    for check in result.plan.checks:
        yield f"checked: {check}"
    for rest in result.records.unchecked():
        yield f"not checked  {rest}"


def doubts(result: Result, options: Options) -> Iterator[str]:
    """Yields what a run's user is warned of when it is done."""
    if options.device == "cuda":
        yield "the planned peak does not count what torch and CUDA take"
    for name, count in sorted(result.outcome.overflows.items()):
        yield f"{count:,} values of {name} overflowed in the cast"
    for left in result.left_over:
        command = f"shardmerge clean {_quoted(shown_path(result.path))}"
        yield f"an unfinished run with other options left {shown_path(left.path)} ({left}); to remove it: {command}"


def _kept(result: Result) -> str:
    return "all of it was made before" if result.outcome.checksums else "there already, nothing to do"


def _made(result: Result, prepared: Prepared, options: Options, seconds: float) -> Iterator[str]:
    outcome, files = result.outcome, len(result.plan.shards)
    rate = (outcome.bytes_written + outcome.bytes_cloned) / max(seconds, 1e-9)
    yield f"{seconds:.1f} s ({human_bytes(int(rate))}/s)"
    yield explain.moved_text(moved(result.plan, outcome.bytes_cloned))
    several = prepared.how.processes > 1
    if options.engine == "here" and not (several and options.check):  # a child of --check is larger than any of ours
        yield f"peak memory {_mebibytes(_peak_bytes(several=several))}{' a process' if several else ''}"
    if result.made < files:
        yield f"{files - result.made} of {files} files were made before"


def _peak_bytes(*, several: bool) -> int:
    """Returns the most resident memory that this process has had, or any of several that it forked.

    Of this process what /proc says: the kernel lets a process begin with the peak of the one that started it.
    """
    import resource

    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        lines = []
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if several else 0
    return max(own, children) << 10  # both in KiB


def _size(plan: Plan) -> str:
    count = sum(1 for _ in plan.tensors())
    return f"{counted(count, 'tensor')}, {human_bytes(plan.tensor_bytes)} in {counted(len(plan.shards), 'file')}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def shown_path(path: Path) -> str:
    """Returns a path as people write it: below the current directory without the way to that."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed
        return str(path)
    return str(path.relative_to(here)) if path != here and path.is_relative_to(here) else str(path)


def _quoted(text: str) -> str:
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    from shlex import quote

    return quote(text)


def result_json(result: Result, prepared: Prepared, seconds: float) -> dict[str, object]:
    """Returns what a run did as plain JSON values."""
    return {
        "path": str(result.path),
        "plan": result.plan.id,
        "tensors": sum(1 for _ in result.plan.tensors()),
        "total_size": result.plan.tensor_bytes,
        "parts_made": result.made,
        "bytes_read": result.outcome.bytes_read,
        "bytes_written": result.outcome.bytes_written,
        **explain.moved_json(moved(result.plan, result.outcome.bytes_cloned)),
        "clone_seconds": round(result.outcome.clone_seconds, 6),
        "overflows": result.outcome.overflows,
        "source_records": asdict(result.records),
        "warnings": list(result.plan.warnings),
        "checks": list(result.plan.checks),
        "notes": {source.name: list(source.notes) for source in result.plan.sources if source.notes},
        "left_over": [{"path": str(left.path), "nbytes": left.nbytes} for left in result.left_over],
        "planned_peak": prepared.how.peak,
        "seconds": round(seconds, 3),
    }
