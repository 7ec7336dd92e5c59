"""Every error of the system, at every call: ``python -m tests.every_error`` writes ``tests/soak/errors.json``.

Each command of ``error_ways`` is run once undisturbed. Then each of its calls that looks at, reads or changes a file
fails in turn, with each error that such a call has, once or from then on. After each the output path is as it was or
holds the right result, the sources are untouched, the exit code is 0, 1, 4 or 6, the error names the file and what to
do, and the same command then gives the right result and leaves nothing beside.

What was tried is kept as it goes; a run that was stopped goes on, and tries again what was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

from tests.error_ways import WAYS, Conversion, Fault, NotMet
from tests.faults import tool
from tests.killing import Machine, machine

RESULTS = Path(__file__).parent / "soak" / "errors.json"

# How many ways are tried at a time.
_SIDE_BY_SIDE = 3

# How often the result file is written, in seconds.
_OFTEN = 20.0

# Name of the call, name of the error, whether it lasted, and what became of it.
Outcome: TypeAlias = tuple[str, str, bool, str]


@dataclass
class Tried:
    """What became of the faults of one way.

    Attributes
    ----------
    calls
        How many calls a run makes.
    faults
        How many faults there are.
    tried
        How many of them were tried, in the order that ``in_order`` gives.
    missed
        How many of those were not met: a run of several processes does not make the same calls each time.
    outcomes
        How often a call with an error came to an outcome.
    wrong
        What may never be.
    """

    calls: int
    faults: int
    tried: int = 0
    missed: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        outcomes = [[*outcome, count] for outcome, count in sorted(self.outcomes.items())]
        return {**vars(self), "outcomes": outcomes}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Tried:
        """Returns what ``row`` gave."""
        outcomes = Counter({(call, error, lasting, outcome): n for call, error, lasting, outcome, n in row["outcomes"]})
        return cls(**{**row, "outcomes": outcomes})


def trying(name: str, base: Path, runs: Machine, before: Tried | None = None, every: int = 1) -> Iterator[Tried]:
    """Tries every n-th fault of a way, in an order that may be cut short; yields what is known after each.

    Parameters
    ----------
    name, base, runs
        Of the way, a directory to work in, and what runs commands.
    before
        What is known already.
    every
        Of how many faults one is tried.
    """
    conversion = Conversion(base, WAYS[name], runs)
    faults = list(conversion.faults())
    found = Tried(len(conversion.calls), len(faults))
    if before is not None and (before.faults == found.faults or not conversion.way.settled):
        found = before
    again = {text: fault for fault in faults for text in found.wrong if text.startswith(f"{fault} ")}
    for text, fault in again.items():
        _try(conversion, fault, found)
        found.wrong.remove(text)
        yield found
    for number in _in_order(len(faults), every)[found.tried :]:
        _try(conversion, faults[number], found)
        found.tried += 1
        yield found
    yield found


def _try(conversion: Conversion, fault: Fault, found: Tried) -> None:
    try:
        found.outcomes[fault.call, fault.error, fault.lasting, conversion.outcome(fault)] += 1
    except NotMet:
        found.missed += 1
    except AssertionError as error:
        found.wrong.append(f"{fault} {conversion.calls[fault.at - 1].a}\n    {error}")
        print(found.wrong[-1], flush=True)


def _in_order(faults: int, every: int) -> list[int]:
    numbers = range(0, faults, every)
    return random.Random(0).sample(numbers, len(numbers))


# --- all of them ---


def main() -> None:
    """Tries all, or every n-th, and writes what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", default=list(WAYS), help="which commands; without, all")
    parser.add_argument("--every", type=int, default=1, help="only every n-th fault; then nothing is written")
    parser.add_argument("--minutes", type=float, default=inf, help="stop after so long, each command after its share")
    parser.add_argument("--anew", action="store_true", help="try again what was tried")
    given = parser.parse_args()
    known = {} if given.every > 1 else _known()
    if given.anew:
        known = {name: one for name, one in known.items() if name not in given.ways}
    _tried(given.ways, known, given.every, given.minutes)
    for name in given.ways:
        one = known[name]
        print(f"{name}: {one.calls} calls, {one.tried} of {one.faults} faults, {len(one.wrong)} wrong")
    raise SystemExit(any(known[name].wrong for name in given.ways))


def _tried(names: Sequence[str], known: dict[str, Tried], every: int, minutes: float) -> None:
    """Tries several ways side by side: a run waits most of its time for other processes."""
    seconds = 60 * minutes * _SIDE_BY_SIDE / len(names)
    base = Path(tempfile.mkdtemp(prefix="shardmerge-errors-", dir="/dev/shm"))
    kept = _Kept(known, every == 1)
    try:
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            # Numbers, since LD_PRELOAD cannot take a path with a space or a comma.
            places = {name: base / str(number) for number, name in enumerate(names)}
            for done in [pool.submit(_tried_for, seconds, name, places[name], kept, every) for name in names]:
                done.result()
    finally:
        shutil.rmtree(base)


def _tried_for(seconds: float, name: str, base: Path, kept: _Kept, every: int) -> None:
    began = time.monotonic()
    for folder in ("machine", "scene"):
        (base / folder).mkdir(parents=True)
    with machine(base / "machine", tool("gcc")) as runs:
        for found in trying(name, base / "scene", runs, kept.known.get(name), every):
            kept.know(name, found)
            if time.monotonic() - began > seconds:
                break
    kept.save()


@dataclass
class _Kept:
    """What is known, written down every few seconds, or not at all."""

    known: dict[str, Tried]
    written: bool
    _saved: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def know(self, name: str, found: Tried) -> None:
        with self._lock:
            self.known[name] = found
        if time.monotonic() - self._saved > _OFTEN:
            self.save()

    def save(self) -> None:
        with self._lock:
            if self.written:
                _save(self.known)
            self._saved = time.monotonic()


def _known() -> dict[str, Tried]:
    if not RESULTS.exists():
        return {}
    return {name: Tried.of(row) for name, row in json.loads(RESULTS.read_text("utf-8"))["ways"].items()}


def _save(known: dict[str, Tried]) -> None:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    ways = {name: known[name].row() for name in WAYS if name in known}
    text = json.dumps({"date": date, "kernel": os.uname().release, "ways": ways}, indent=1)
    temporary = RESULTS.with_name(f"{RESULTS.name}.{os.getpid()}.tmp")
    temporary.write_text(text + "\n")
    temporary.rename(RESULTS)


if __name__ == "__main__":
    main()
