"""Mutation testing: the table in docs/reliability.md, and the page of what survived."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from math import comb
from pathlib import Path
from typing import Any

from docs.markdown import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "soak" / "mutants"

# How the reason begins where no test can see a change.
UNSEEN = ("Equivalent:", "Speed only:", "Not run:")

_HEAD = """# Changes of the code that no test notices

Generated from result files; [Reliability](reliability.md#mutation-testing) says how they were made. Of the places
drawn at random, these changes survived. Each line is the code, what became of it, and why no test fails.
"""


def mutants() -> list[str]:
    """Returns the lines of the table: by room, how many places there are, were tried, and survived."""
    rooms = _rooms()
    rows = [(f"`{room}`", *_cells(kept)) for room, kept in rooms.items()]
    dates = sorted({kept["date"] for kept in rooms.values()})
    said = f"Measured on {' and '.join(dates)} with {next(iter(rooms.values()))['tool']}, by `make mutants`."
    head = ("package", "places", "tried", "killed", "timed out", "survived", "of these unseen", "others", "at most")
    return [said, "", *table(head, rows)]


def mutants_page() -> dict[str, str]:
    """Returns the page of what survived."""
    lines = [_HEAD]
    for room, kept in _rooms().items():
        lines += [f"## {room}", "", *_survivors(kept), ""]
    return {"mutants.md": "\n".join(lines)}


def _rooms() -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def _cells(kept: dict[str, Any]) -> Iterator[str]:
    count, tried = Counter(one["outcome"] for one in kept["tried"].values()), len(kept["tried"])
    yield f"{sum(kept['places'].values()):,}"
    yield from (f"{number:,}" for number in (tried, count["killed"], count["timed out"]))
    survived = [one for one in kept["tried"].values() if one["outcome"] == "survived"]
    others = sum(not one.get("reason", "").startswith(UNSEEN) for one in survived)
    yield from (f"{number:,}" for number in (len(survived), len(survived) - others))
    yield f"{others} ({others / tried:.1%})"
    yield f"{bound(others, tried):.1%}"


def bound(found: int, tried: int) -> float:
    """Returns the share of all that survives at most, with 95 % confidence (Clopper and Pearson, one side)."""
    low, high = found / tried, 1.0
    for _ in range(40):
        share = (low + high) / 2
        chance = sum(comb(tried, many) * share**many * (1 - share) ** (tried - many) for many in range(found + 1))
        low, high = (share, high) if chance > 0.05 else (low, share)
    return high


def _survivors(kept: dict[str, Any]) -> Iterator[str]:
    found = [(key, one) for key, one in sorted(kept["tried"].items()) if one["outcome"] == "survived"]
    if not found:
        yield "None."
    for key, one in found:
        module, function, _ = key.split(" ", 2)
        before, after = ([line[1:].strip() for line in one["change"] if line[0] == sign] for sign in "-+")
        became = f"becomes {_code(after[0])}" if after else "is removed"
        place = f"`{module.removeprefix('shardmerge/')}`, {_code(function)}"
        yield f"- {place}: {_code(before[0])} {became}. {one.get('reason', 'Not looked at yet.')}"


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"
