"""Tries places, and keeps what became of each in ``tests/soak/mutants/<room>.json``."""

from __future__ import annotations

import difflib
import json
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
_MOST, _LONGEST = 60, 20.0
# A whole file of tests may take so long, in seconds.
_LIMIT = 600.0


def campaign(copy: Copy, room: str, limit: int, *, again: bool = False) -> None:
    """Tries the places that come next, until so many of the room are tried; or those anew that survived."""
    kept, found, covering = _kept(room), places(copy.tree, room, SEED), Covering()
    tried = kept["tried"]
    for key in set(tried) - {place.key for place in found}:
        del tried[key]  # the code is no longer there
    kept["places"] = dict(sorted(Counter(place.module for place in found).items()))
    for place in found[: None if again else limit]:
        if (again and _is_open(tried.get(place.key))) or (not again and place.key not in tried):
            before = tried.get(place.key, {})
            began = time.monotonic()
            tried[place.key] = _try(
                place, _Tests(copy, covering, _killers(tried, place), WHOLE[room].split() if again else ())
            )
            if before.get("outcome") == "survived":
                tried[place.key]["was"] = "survived"
            _write(room, kept)
            one = tried[place.key]
            print(f"{one['outcome']} {time.monotonic() - began:.0f} s: {place.key} | {one.get('by', '')}", flush=True)


def show(rooms: Iterable[str]) -> None:
    """Prints numbers, and what survived."""
    for room in rooms:
        kept = _kept(room)
        print(room, sum(kept["places"].values()), dict(Counter(one["outcome"] for one in kept["tried"].values())))
        for key, one in kept["tried"].items():
            if one["outcome"] == "survived":
                print(f"  {key} (line {one['line']})", *one["change"], f"reason: {one.get('reason')}", sep="\n      ")


def _is_open(one: dict[str, Any] | None) -> bool:
    return one is not None and one["outcome"] == "survived" and not one.get("reason")


def _kept(room: str) -> dict[str, Any]:
    path = FOLDER / f"{room}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    return {"seed": SEED, "places": {}, "tried": {}}


def _write(room: str, kept: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    head = {
        "what": "places of the code that were changed, one at a time, and whether a test failed",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "tool": f"Cosmic Ray {version('cosmic-ray')}",
    }
    (FOLDER / f"{room}.json").write_text(json.dumps(head | kept, indent=1, ensure_ascii=False) + "\n")


def _killers(tried: dict[str, Any], place: Place) -> Counter[str]:
    return Counter(one["by"] for key, one in tried.items() if one.get("by") and key.startswith(place.module))


@dataclass(frozen=True)
class _Tests:
    """Which tests are asked: those of the line, the likeliest and quickest first; then whole files."""

    copy: Copy
    covering: Covering
    killers: Counter[str]
    whole: Sequence[str]

    def first_failure(self, place: Place) -> Ran:
        seconds = self.covering.seconds
        found = self.covering.tests(place.module, place.line, place.first)
        ordered = sorted(found, key=lambda test: (-self.killers[test], seconds[test]))
        quick = _within(ordered[:_MOST], seconds)
        ran = self.copy.run(quick, 60 + 20 * sum(seconds[one] for one in quick), None, "-x") if quick else Ran("passed")
        if ran.outcome != "passed" or not self.whole:
            return ran
        files = [one.partition("::")[0] for one in ordered] + [f"tests/test_{name}.py" for name in self.whole]
        for name in dict.fromkeys(files):
            ran = self.copy.run([name], _LIMIT, None, "-x", *self.covering.failing())
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
