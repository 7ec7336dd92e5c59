"""The table at the head of docs/reliability.md: what was tried how often, and how often it went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from docs.markdown import table
from docs.soak_results import read
from docs.soak_tables import OUTCOMES

_Read = dict[str, Any]
_Counts = tuple[int, int]


def _rows(result: _Read, tried: str) -> _Counts:
    return sum(row[tried] for row in result["rows"]), sum(len(row["wrong"]) for row in result["rows"])


def _errors(result: _Read) -> _Counts:
    ways = result["ways"].values()
    return sum(way["tried"] for way in ways), sum(len(way["wrong"]) for way in ways)


def _limits(result: _Read) -> _Counts:
    limits = result["limits"].values()
    return sum(sum(one["outcomes"].values()) for one in limits), sum(len(one["wrong"]) for one in limits)


def _malformed(result: _Read) -> _Counts:
    """A file that is neither refused nor read without effect fails the test that counts them."""
    return sum(kind["files"] for kind in result["kinds"].values()), 0


def _fuzzing(result: _Read) -> _Counts:
    targets = result["targets"].values()
    return sum(one["executions"] for one in targets), sum(len(one["findings"]) for one in targets)


def _readers(result: _Read) -> _Counts:
    kinds = result["kinds"].values()
    return sum(kind["files"] for kind in kinds), sum(len(kind["wrong"]) + kind["crashed"] for kind in kinds)


def _bits(result: _Read) -> _Counts:
    found = [one for files in result["formats"].values() for one in files.values()]
    return sum(one["flips"] for one in found), sum(one["unseen"] + one["unnamed"] + one["bugs"] for one in found)


def _parts(result: _Read) -> _Counts:
    rows = result["rows"]
    return sum(row["count"] for row in rows), sum(row["count"] for row in rows if row["outcome"] not in OUTCOMES)


def _changes(result: _Read) -> _Counts:
    rows = result["rows"]
    wrong = sum(len(row["wrong"]) for row in rows)
    return sum(sum(row["outcomes"].values()) for row in rows) + wrong, wrong


def _races(result: _Read) -> _Counts:
    plays = result["plays"].values()
    return sum(play["played"] for play in plays), sum(len(play["wrong"]) for play in plays)


def _same(result: _Read) -> _Counts:
    formats = result["formats"].values()
    return sum(one["runs"] for one in formats), sum(len(one["different"]) for one in formats)


def _interrupts(result: _Read) -> _Counts:
    rows = result["rows"]
    return sum(sum(row["outcomes"].values()) for row in rows), sum(len(row["wrong"]) for row in rows)


def _day(result: _Read) -> _Counts:
    counts = result["counts"]
    return sum(counts["commands"].values()) + sum(counts["API calls"].values()), len(result["violations"])


# By the section of the page: the result file, what was tried, and how both are counted.
_SECTIONS: dict[str, tuple[str, str, Callable[[_Read], _Counts]]] = {
    "Errors of the system": ("errors", "calls that fail", _errors),
    "Full disks and limits of a process": ("limits", "runs", _limits),
    "Interrupts of the Python API": ("interrupts", "interrupts", _interrupts),
    "Malformed files": ("corpus", "files", _malformed),
    "Fuzzing": ("fuzz", "inputs", _fuzzing),
    "Other readers": ("differential", "random files", _readers),
    "Flipped bits": ("bit-flips", "bits of results and plans", _bits),
    "Flipped bits in unfinished files": ("part-flips", "bits", _parts),
    "Sources that change": ("source-changes", "runs", _changes),
    "Races": ("races", "races", _races),
    "Same bytes": ("same-bytes", "runs", _same),
    "Kills": ("kills", "kills", lambda result: _rows(result, "tried")),
    "Power cuts": ("power-cuts", "cuts", lambda result: _rows(result, "cuts")),
    "A day's work": ("day", "commands and calls", _day),
}


def summary() -> list[str]:
    """Returns the lines of the table, a row a section."""
    rows = []
    for section, (name, what, counted) in _SECTIONS.items():
        tried, wrong = counted(read(name))
        rows.append((f"[{section}](#{_anchor(section)})", f"{tried:,} {what}", f"{wrong:,}"))
    return table(("what", "tried", "went wrong"), rows)


def _anchor(section: str) -> str:
    kept = "".join(one for one in section.lower() if one.isalnum() or one in " -")
    return "-".join(kept.split())
