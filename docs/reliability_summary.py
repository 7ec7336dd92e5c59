"""The table at the head of docs/reliability.md: what was tried how often, and how often it went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs.markdown import table
from docs.soak_tables import OUTCOMES

_SOAK = Path(__file__).resolve().parent.parent / "tests" / "soak"

_Read = dict[str, Any]
_Counts = tuple[int, int]


def _rows(read: _Read, tried: str) -> _Counts:
    return sum(row[tried] for row in read["rows"]), sum(len(row["wrong"]) for row in read["rows"])


def _errors(read: _Read) -> _Counts:
    ways = read["ways"].values()
    return sum(way["tried"] for way in ways), sum(len(way["wrong"]) for way in ways)


def _limits(read: _Read) -> _Counts:
    limits = read["limits"].values()
    return sum(sum(one["outcomes"].values()) for one in limits), sum(len(one["wrong"]) for one in limits)


def _malformed(read: _Read) -> _Counts:
    """A file that is neither refused nor read without effect fails the test that counts them."""
    return sum(kind["files"] for kind in read["kinds"].values()), 0


def _fuzzing(read: _Read) -> _Counts:
    targets = read["targets"].values()
    return sum(one["executions"] for one in targets), sum(sum(one["findings"].values()) for one in targets)


def _readers(read: _Read) -> _Counts:
    kinds = read["kinds"].values()
    return sum(kind["files"] for kind in kinds), sum(len(kind["wrong"]) + kind["crashed"] for kind in kinds)


def _bits(read: _Read) -> _Counts:
    found = [one for files in read["formats"].values() for one in files.values()]
    return sum(one["flips"] for one in found), sum(one["unseen"] + one["unnamed"] + one["bugs"] for one in found)


def _parts(read: _Read) -> _Counts:
    rows = read["rows"]
    return sum(row["count"] for row in rows), sum(row["count"] for row in rows if row["outcome"] not in OUTCOMES)


def _changes(read: _Read) -> _Counts:
    rows = read["rows"]
    wrong = sum(len(row["wrong"]) for row in rows)
    return sum(sum(row["outcomes"].values()) for row in rows) + wrong, wrong


def _races(read: _Read) -> _Counts:
    plays = read["plays"].values()
    return sum(play["played"] for play in plays), sum(len(play["wrong"]) for play in plays)


def _same(read: _Read) -> _Counts:
    formats = read["formats"].values()
    return sum(one["runs"] for one in formats), sum(len(one["different"]) for one in formats)


def _day(read: _Read) -> _Counts:
    counts = read["counts"]
    return sum(counts["commands"].values()) + sum(counts["API calls"].values()), len(read["violations"])


# By the section of the page: the result file, what was tried, and how both are counted.
_SECTIONS: dict[str, tuple[str, str, Callable[[_Read], _Counts]]] = {
    "Errors of the system": ("errors", "calls that fail", _errors),
    "Full disks and limits of a process": ("limits", "runs", _limits),
    "Malformed files": ("corpus", "files", _malformed),
    "Fuzzing": ("fuzz", "inputs", _fuzzing),
    "Other readers": ("differential", "random files", _readers),
    "Flipped bits": ("bit-flips", "bits of results and plans", _bits),
    "Flipped bits in unfinished files": ("part-flips", "bits", _parts),
    "Sources that change": ("source-changes", "runs", _changes),
    "Races": ("races", "races", _races),
    "Same bytes": ("same-bytes", "runs", _same),
    "Kills": ("kills", "kills", lambda read: _rows(read, "tried")),
    "Power cuts": ("power-cuts", "cuts", lambda read: _rows(read, "cuts")),
    "A day's work": ("day", "commands and calls", _day),
}


def summary() -> list[str]:
    """Returns the lines of the table, a row a section."""
    rows = []
    for section, (name, what, counted) in _SECTIONS.items():
        tried, wrong = counted(json.loads((_SOAK / f"{name}.json").read_text("utf-8")))
        rows.append((f"[{section}](#{_anchor(section)})", f"{tried:,} {what}", f"{wrong:,}"))
    return table(("what", "tried", "went wrong"), rows)


def _anchor(section: str) -> str:
    kept = "".join(one for one in section.lower() if one.isalnum() or one in " -")
    return "-".join(kept.split())
