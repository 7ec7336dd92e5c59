"""More races for one output path than the test suite has time for: ``python -m tests.races``.

Two to eight processes: runs of one plan and of another, shares, ``finish``, ``clean``, ``--fresh``, ``--overwrite``;
some are killed. In schedules they take turns call by call. At a time they run as the system has it: they begin within a
second, and some are stopped (SIGSTOP) for a while. Whatever became of them, the output path holds nothing or one
whole result, no process ended with a traceback, and the same command then ends with the result and nothing else.

``tests/soak/races.json`` is written after each race; what it holds already is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tests.campaigns import machine_in_memory
from tests.killing import Machine, Ran
from tests.scene import Scene
from tests.test_races import all_at_a_time, anybody_at_anything

RESULTS = Path(__file__).parent / "soak" / "races.json"

Play: TypeAlias = Callable[[Scene, Machine, int], list[Ran]]
PLAYS: dict[str, Play] = {"turns, call by call": anybody_at_anything, "at a time": all_at_a_time}


def main() -> None:
    """Plays races of both kinds, and writes what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=250, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next follow")
    parser.add_argument("--again", action="store_true", help="begin anew, and do not go on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    value = _begun(given.out, given.seed, again=given.again)
    with machine_in_memory("races") as (base, runs):
        scene = Scene.set(base / "scene", runs)
        for number in range(given.races):
            for name, play in PLAYS.items():
                if number >= value["plays"][name]["played"]:
                    _count(value["plays"][name], value["seed"] + number, lambda s, p=play: p(scene, runs, s))
                    given.out.write_text(json.dumps(value, indent=1) + "\n")
        scene.untouched()
    raise SystemExit(any(row["wrong"] for row in value["plays"].values()))


def _begun(path: Path, seed: int, *, again: bool) -> dict[str, Any]:
    if path.exists() and not again:
        return dict(json.loads(path.read_text()))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = {name: {"played": 0, "processes": 0, "killed": 0, "refused": 0, "wrong": []} for name in PLAYS}
    return {"date": date, "kernel": os.uname().release, "seed": seed, "plays": rows}


def _count(row: dict[str, Any], seed: int, play: Callable[[int], list[Ran]]) -> None:
    row["played"] += 1
    try:
        played = play(seed)
    except AssertionError as error:
        row["wrong"].append(f"seed {seed}: {error}"[:1000])
        print(row["wrong"][-1], flush=True)
        return
    row["processes"] += len(played)
    row["killed"] += sum(ran.code < 0 for ran in played)
    row["refused"] += sum(ran.code > 0 for ran in played)


if __name__ == "__main__":
    main()
