"""The tables of kills, power cuts and syncs in docs/reliability.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from docs.markdown import table
from docs.soak_results import measured, read

# The ways of tests/scene.py.
_WAYS = {
    "plain": "`run` of a plan, safetensors: three files of weights, index, small files",
    "bin": "the same, files of torch",
    "overwrite": "`run --overwrite`: another result is replaced",
    "no-exchange": "the same where two directories cannot be exchanged in one step",
    "empty": "into an empty directory of another owner",
    "mapping": "`run` of a mapping",
    "processes": "`run` in two processes",
    "shares": "`run --part 0/2`, then `run --part 1/2`",
    "finish": "`finish`, all parts made before",
    "unsynced": "`run --part 0/2 --no-sync`, then `run`",
    "zero": "`convert` of DeepSpeed ZeRO-3 to safetensors",
    "zero to bin": "the same to files of torch, `--overwrite`",
    "to dcp": "`convert` of safetensors to DCP",
    "to dcp, overwrite": "the same, `--overwrite`",
    "from dcp": "`convert` of DCP to safetensors",
    "blocks": "`convert` of tensors that XFS clones",
    "clean of parts": "`clean` of a run that made all parts",
    "clean of gap": "`clean` while neither result is at the output path",
    "verify": "`verify`, killed at every call that looks at or reads a file too",
    "verify --sources": "`verify --sources`, the same",
    "any": "all of the above up to `clean`, at random",
}


def kills() -> list[str]:
    """Returns the lines of the table of kills: by what was run and how it was killed."""
    result = read("kills")
    tried, wrong = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in result["rows"]:
        kind = row["way"], row["what"].partition(", seeds")[0]
        tried[kind] += row["tried"]
        wrong[kind] += len(row["wrong"])
    rows = [
        (_WAYS[way], what, f"{tried[way, what]:,}", str(wrong[way, what]))
        for way, what in sorted(tried, key=lambda kind: list(_WAYS).index(kind[0]))
    ]
    rows.append(("all", "", f"{tried.total():,}", str(wrong.total())))
    head = ("what was run", "and what was done to it", "times", "violations")
    left = [_WAYS[way] for way in _WAYS if way not in {way for way, _ in tried}]
    without = ["", f"Not run at every call yet: {'; '.join(left)}."] if left else []
    return [f"{measured(result, 'kills')}.", "", *table(head, rows), *without]


def power_cuts() -> list[str]:
    """Returns the lines of the table of power cuts: by file system, and by what was run."""
    result = read("power-cuts")
    rows = result["rows"]
    by_disk = [
        (
            row["disk"],
            f"`{row['options']}`",
            *(f"{row['journal'].get(journal, 0):,}" for journal in ("lost", "kept")),
            f"{row['ended']:,}",
            f"{row['cloned']:,}",
            str(len(row["wrong"])),
        )
        for row in rows
    ]
    head = (
        "file system",
        "mounted",
        "journal lost",
        "journal kept",
        "of these after exit 0",
        "bytes cloned",
        "violations",
    )
    ways = [
        (_WAYS[way], *(f"{row['ways'].get(way, 0)}" for row in rows))
        for way in _WAYS
        if any(way in row["ways"] for row in rows)
    ]
    disks = ("what was run", *(row["disk"] for row in rows))
    return [f"{measured(result, 'cuts')}.", "", *table(head, by_disk), "", *table(disks, ways)]


def syncs() -> list[str]:
    """Returns the lines of the table of syncs: what each is of, and what misses it."""
    result = read("syncs")
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    disks = list(dict.fromkeys(disk for row in rows for disk in row["disks"]))
    lines = [
        (
            row["sync"],
            f"`{row['site']}`",
            str(row["calls"]),
            str(row["model"]) if row["model"] else "",
            *(_cut(row["disks"].get(disk)) for disk in disks),
        )
        for row in rows
    ]
    head = ("sync of", "function", "calls", "missed by the model", *disks)
    return [f"{measured(result, 'syncs')}.", "", *table(head, lines)]


def _cut(how: str | None) -> str:
    return "not tried" if how is None else how.partition(":")[0] or "no"
