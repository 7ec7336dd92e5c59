"""The tables of docs/reliability.md: what errors of the system came to, by call and by error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.markdown import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "soak" / "errors.json"

# Names of calls as ``tests/trap.c`` has them.
_GROUPS = {
    "look at a file (stat, access, readlink, statvfs)": ("stat", "fstat", "access", "readlink", "statvfs"),
    "list a directory": ("opendir", "readdir"),
    "open to read": ("open-read",),
    "read, or map": ("read", "pread", "mmap", "populate", "fadvise"),
    "create a file or directory": ("open", "tmpfile", "mkdir", "link"),
    "write (also truncate, start writing)": ("write", "pwrite", "ftruncate", "sync_file_range", "ioctl"),
    "sync": ("fsync",),
    "rename": ("rename", "exchange"),
    "remove": ("unlink", "rmdir"),
    "change attributes": ("chmod", "chown", "utimens", "setxattr"),
    "close": ("close",),
}
_OUTCOMES = ("succeeded", "ended with an error", "published, not confirmed")

# How often each of the outcomes came, by what the row is of.
_Counts = Mapping[str, Counter[str]]


def error_outcomes() -> list[str]:
    """Returns the lines of the tables, and the counts and date above them."""
    read = json.loads(RESULTS.read_text("utf-8"))
    ways: Mapping[str, Mapping[str, Any]] = read["ways"]
    head = ("command, or source of a conversion", "calls of a run", "faults", "tried", "wrong")
    counts = [
        (
            name,
            *(f"{one[number]:,}" if one[number] else "" for number in ("calls", "faults", "tried")),
            str(len(one["wrong"])),
        )
        for name, one in ways.items()
    ]
    all_of = [row for one in ways.values() for row in one["outcomes"]]
    said = f"Measured on {read['date']}, Linux {read['kernel']}, by `python -m tests.every_error`."
    by_call = _table("call that fails", _counted(all_of, _group), list(_GROUPS))
    by_error = _counted(all_of, _error)
    return [said, "", *table(head, counts), "", *by_call, "", *_table("error", by_error, sorted(by_error))]


def _counted(rows: Sequence[Sequence[Any]], name: Any) -> _Counts:  # noqa: ANN401  # a function of a row
    found: dict[str, Counter[str]] = {}
    for row in rows:
        *_, outcome, count = row
        found.setdefault(name(row), Counter())[_outcome(outcome)] += count
    return found


def _group(row: Sequence[Any]) -> str:
    return next(name for name, calls in _GROUPS.items() if row[0] in calls)


def _error(row: Sequence[Any]) -> str:
    _, error, lasting, *_ = row
    return f"{error}, from then on" if lasting else str(error)


def _outcome(text: str) -> str:
    exit_code = text.split()[1]
    return {"0": _OUTCOMES[0], "6": _OUTCOMES[2]}.get(exit_code, _OUTCOMES[1])


def _table(first: str, counts: _Counts, order: Sequence[str]) -> list[str]:
    return table((first, "tried", *_OUTCOMES), _rows(counts, order))


def _rows(counts: _Counts, order: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name in order:
        found = counts.get(name, Counter())
        if found:
            yield name, f"{found.total():,}", *(f"{found[outcome]:,}" for outcome in _OUTCOMES)
