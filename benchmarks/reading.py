"""What the page asks of a result file: contenders, ratios round by round, floors. Results of schema 1 are read too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from shardmerge.bench.figures import ratios

# As json.loads gives it; `benchmarks.measuring` says what is in it.
Result: TypeAlias = Mapping[str, Any]
Entry: TypeAlias = Mapping[str, Any]

DURABLE, QUICK = "shardmerge", "shardmerge-no-sync"


def read(folder: Path) -> dict[str, Result]:
    """Returns all results of a folder by the stem of their file."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


def cases(results: Mapping[str, Result]) -> dict[str, Result]:
    """Returns those that `benchmarks.run` measured."""
    return {stem: result for stem, result in results.items() if "case" in result}


def contender(result: Result, key: str) -> Entry | None:
    """Returns a contender, or None."""
    return next((entry for entry in result["contenders"] if entry["key"] == key), None)


def peers(result: Result) -> list[Entry]:
    """Returns those that are neither shardmerge nor the floor."""
    return [entry for entry in result["contenders"] if entry["kind"] == "peer"]


def floor_of(result: Result, *, synced: bool) -> Entry:
    """Returns the floor of a guarantee; in schema 1 a copy alone."""
    keys = ("floor-sync", "cp-sync") if synced else ("floor", "cp")
    return next(entry for key in keys if (entry := contender(result, key)))


def ratio(one: Entry, other: Entry, name: str = "wall") -> dict[str, float]:
    """Returns the spread of one over the other, round by round; nothing if a figure is missing."""
    mine, theirs = ([run.get(name) for run in entry["runs"]] for entry in (one, other))
    if None in mine or None in theirs:
        return {}
    return ratios(mine, theirs)


def synced(entry: Entry) -> bool:
    """Tells whether its result is on the disk when it ends."""
    return bool(entry.get("synced", entry["key"] in (DURABLE, "cp-sync")))


def output_bytes(result: Result) -> float:
    """Returns the bytes of the job's output."""
    mine = contender(result, DURABLE)
    return float(result.get("output_bytes") or (mine["written"]["median"] if mine else 0))


def machines(results: Mapping[str, Result]) -> Iterator[tuple[str, Result]]:
    """Yields the stem and the machine card of every result that has one."""
    for stem, result in results.items():
        if "machine" in result:
            yield stem, result["machine"]
        for run in result.get("runs", {}).values():
            yield stem, run["machine"]
