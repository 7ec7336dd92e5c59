"""Tries places, and keeps what became of each in ``tests/soak/mutants/<room>.json``."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from tests.mutants.covering import WHOLE, Covering
from tests.mutants.places import Place, places
from tests.mutants.runs import ROOT, Copy, Ran

FOLDER = ROOT / "tests" / "soak" / "mutants"
SEED = 0
# Tests of one line: so many, and so long without a change, in seconds.
_MOST, _LONGEST = 30, 12.0
# How long a file of tests takes that was not measured, in seconds.
_UNKNOWN = 60.0


def campaign(copy: Copy, room: str, limit: int, again: Again | None = None) -> None:
    """Tries the places that come next, until so many of the room are tried; or those anew that survived."""
    found, covering = places(copy.tree, room, SEED), Covering()
    _note(room, found, {})
    for test in (one for one in (again.tests if again else ()) if "::" in one):  # a whole file may take long
        assert copy.run([test], 10 * _UNKNOWN, None, "-x").outcome == "passed", f"{test} fails without a change"
    for place in found[: None if again else limit]:
        tried = _kept(room)["tried"]
        before = tried.get(place.key, {})
        if again.wants(place.key, before) if again else not before:
            began = time.monotonic()
            tests = _Tests(copy, covering, _killers(tried, place), again)
            one = _try(place, tests) | ({"survived": True} if again else {})
            _note(room, found, {place.key: one})
            print(f"{one['outcome']} {time.monotonic() - began:.0f} s: {place.key} | {one.get('by', '')}", flush=True)


@dataclass(frozen=True)
class Again:
    """What is tried again: what survived and has no reason, and whose text holds ``only``.

    Attributes
    ----------
    only
        Part of its text, or nothing.
    tests
        Files of tests, or ids; nothing else is run then. Of none, the tests of the line and whole files.
    """

    only: str
    tests: Sequence[str]

    def wants(self, key: str, one: dict[str, Any]) -> bool:
        """Tells whether a place is tried."""
        return self.only in key and one.get("outcome") == "survived" and not one.get("reason")


def explain(room: str, only: str, reason: str) -> None:
    """Gives the survivor whose text holds ``only`` a reason."""
    kept = _kept(room)
    (key,) = (key for key, one in kept["tried"].items() if only in key and one["outcome"] == "survived")
    _write(room, kept, {key: kept["tried"][key] | {"reason": reason}})


def show(rooms: Iterable[str]) -> None:
    """Prints numbers, and what survived."""
    for room in rooms:
        kept = _kept(room)
        print(room, sum(kept["places"].values()), dict(Counter(one["outcome"] for one in kept["tried"].values())))
        for key, one in kept["tried"].items():
            if one["outcome"] == "survived":
                print(f"  {key} (line {one['line']})", *one["change"], f"reason: {one.get('reason')}", sep="\n      ")


def _kept(room: str) -> dict[str, Any]:
    path = FOLDER / f"{room}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    return {"seed": SEED, "places": {}, "tried": {}}


def _note(room: str, found: Sequence[Place], new: dict[str, Any]) -> None:
    """Adds what became of places, and forgets those whose code is no longer there."""
    keys, kept = {place.key for place in found}, _kept(room)
    kept["tried"] = {key: one for key, one in kept["tried"].items() if key in keys}
    kept["places"] = dict(sorted(Counter(place.module for place in found).items()))
    _write(room, kept, new)


def _write(room: str, kept: dict[str, Any], new: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    head = {
        "what": "places of the code that were changed, one at a time, and whether a test failed",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "tool": f"Cosmic Ray {version('cosmic-ray')}",
    }
    value = head | kept | {"tried": dict(sorted((kept["tried"] | new).items()))}
    temporary = FOLDER / f"{room}.json.{os.getpid()}"
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    temporary.rename(FOLDER / f"{room}.json")


def _killers(tried: dict[str, Any], place: Place) -> Counter[str]:
    return Counter(one["by"] for key, one in tried.items() if one.get("by") and key.startswith(place.module))


@dataclass(frozen=True)
class _Tests:
    """Which tests are asked: those of the line, the likeliest and quickest first; then whole files."""

    copy: Copy
    covering: Covering
    killers: Counter[str]
    again: Again | None

    def first_failure(self, place: Place) -> Ran:
        seconds = self.covering.seconds
        found = self.covering.tests(place.module, place.line, place.first)
        ordered = sorted(found, key=lambda test: (-self.killers[test], seconds[test]))
        quick = _within(ordered[:_MOST], seconds)
        quick = [] if self.again and self.again.tests else quick
        ran = self.copy.run(quick, 60 + 10 * sum(seconds[one] for one in quick), None, "-x") if quick else Ran("passed")
        if ran.outcome != "passed" or not self.again:
            return ran
        files = [one.partition("::")[0] for one in ordered] + [
            f"tests/test_{name}.py" for name in WHOLE[place.room].split()
        ]
        for name in self.again.tests or dict.fromkeys(files):
            usual = sum(took for test, took in seconds.items() if test.startswith(name)) or _UNKNOWN
            ran = self.copy.run([name], 60 + 10 * usual, None, "-x", *self.covering.failing())
            if ran.outcome != "passed":
                break
        return ran


def _within(tests: Sequence[str], seconds: dict[str, float]) -> list[str]:
    """Returns the first tests, as many as take no longer than they may; one at least."""
    chosen, left = list[str](), _LONGEST
    for test in tests:
        left -= seconds[test]
        if chosen and left < 0:
            break
        chosen.append(test)
    return chosen


def _try(place: Place, tests: _Tests) -> dict[str, Any]:
    file = tests.copy.tree / place.module
    text, changed = file.read_text(), place.changed(tests.copy.tree)
    file.write_text(changed)
    try:
        ran = tests.first_failure(place)
    finally:
        file.write_text(text)
    outcome = {"failed": "killed", "passed": "survived"}.get(ran.outcome, ran.outcome)
    said = {"line": place.line, "change": _change(text, changed)} if outcome == "survived" else {}
    return {"outcome": outcome, **({"by": ran.by} if ran.by else {}), **said}


def _change(text: str, changed: str) -> list[str]:
    lines = difflib.unified_diff(text.splitlines(), changed.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]
