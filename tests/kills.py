"""Kills at every call that changes a file: ``python -m tests.kills`` writes ``tests/soak/kills.json``.

Every way to make a result is run once for each of its calls that change a file, and killed before that call; once for
each write, and killed when half of it is written; once for each call, and killed with all processes that it started.
Then the same command is given again. So are ``clean`` and ``verify``; and runs are killed twice, anywhere.

After each kill the output path holds nothing, or what it held before, or the whole result; no source has changed. The
same command then makes the result, with no part made again that was committed, and leaves nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.campaigns import machine_in_memory, write_rows
from tests.killing import HALF, KILL, KILL_ALL, Machine, Trap
from tests.scene import ALL_WAYS, WAYS, Scene, Way, tree

RESULTS = Path(__file__).parent / "soak" / "kills.json"

KINDS = {"killed": KILL, "half written": HALF, "all processes killed": KILL_ALL}


def kill_and_go_on(
    scene: Scene, runs: Machine, way: Way, trap: Trap, made: Path | None = None, **given: object
) -> bool:
    """Runs under a trap, then the same command again; tells whether the first came to its end."""
    scene.begin(way, made)
    first = scene.run(runs, way, trap, **given)
    ended = not runs.hit
    # Of several processes one is killed, which the others say; or all are.
    assert first.code in ((0,) if ended else (-9, 4) if way.processes else (-9,)), first.err
    receipts = scene.stopped(way)
    there = scene.seen(way) == "new"
    assert scene.go_on(runs, way) == (0 if there else scene.parts(way) - receipts)
    scene.published(way)
    return ended


def kill_twice(scene: Scene, runs: Machine, way: Way, ats: tuple[int, int], rng: random.Random) -> None:
    """Kills a run, then the one that goes on; the third comes to its end."""
    scene.begin(way, scene.keep_made(runs, way) if way.made else None)
    kept = 0
    for at in ats:
        trap = Trap(rng.choice([KILL_ALL, HALF]), at=at)
        ran = scene.run(runs, way, trap, processes=way.processes or rng.random() < 0.3)
        assert ran.code in (0, -9, 4), ran.err
        assert scene.stopped(way) >= kept, "a part that was made is lost"
        kept = scene.stopped(way)
    there = scene.seen(way) == "new"
    assert scene.go_on(runs, way) == (0 if there else scene.parts(way) - kept)
    scene.published(way)


# --- commands that make nothing ---


def in_the_gap(scene: Scene, runs: Machine, way: Way) -> Path:
    """Keeps what is there when the output path holds nothing, between what it held and what it is to hold."""
    kept = scene.root / "gap"
    if not kept.exists():
        made = scene.keep_made(runs, way)
        scene.begin(way, made)
        assert scene.run(runs, way).code == 0
        moved = next(n for n, call in enumerate(runs.calls, 1) if call.a == str(scene.out))
        scene.begin(way, made)
        assert scene.run(runs, way, Trap(KILL, at=moved + 1)).code == -9
        scene.in_the_gap(way)
        scene.place.rename(kept)
    return kept


def kill_clean(scene: Scene, runs: Machine, way: Way, left: Path, at: int, again: str) -> bool:
    """Kills ``clean`` of something unfinished, then cleans again or runs; tells whether it was not killed."""
    scene.begin(replace(way, before=""), left)
    before = scene.seen(way)
    first = runs.run("clean", scene.out, trap=Trap(KILL, at=at))
    assert first.code == (-9 if runs.hit else 0), first.err
    ended = not runs.hit
    assert scene.seen(way) in (before, way.before)
    if again == "run":
        assert scene.run(runs, way).code == 0
        scene.published(way)
    else:
        assert runs.run("clean", scene.out).code == 0
        assert scene.seen(way) == way.before
        assert [path.name for path in scene.place.iterdir()] == (["out"] if way.before else [])
    return ended


def kill_verify(scene: Scene, runs: Machine, command: list[object], at: int) -> bool:
    """Kills ``verify`` at any call that looks at, reads or changes something; tells whether it was not killed."""
    first = runs.run(*command, trap=Trap(KILL, at=at, under=str(scene.root)))
    assert first.code == (-9 if runs.hit else 0), first.err
    scene.published(WAYS["plain"])
    return not runs.hit


# --- all of them ---

_Row = dict[str, Any]


def _counted(do: Callable[[int], bool]) -> _Row:
    """Does something at call after call, until it came to its end."""
    row: _Row = {"tried": 0, "wrong": []}
    at = 1
    while True:
        try:
            if do(at):
                return row
        except AssertionError as error:
            row["wrong"].append(f"call {at}: {str(error)[:500]}")
            if len(row["wrong"]) > _ENOUGH:
                return row
        row["tried"] += 1
        at += 1


# Wrong ones of a kind, after which no more are looked for.
_ENOUGH = 20


def _every_kill(scene: Scene, runs: Machine, name: str, kind: str) -> _Row:
    way = ALL_WAYS[name]
    made = scene.keep_made(runs, way) if way.made else None
    only = "pwrite" if kind == "half written" else ""
    return _counted(lambda at: kill_and_go_on(scene, runs, way, Trap(KINDS[kind], at=at, only=only), made))


def _every_clean(scene: Scene, runs: Machine, left: str, again: str) -> _Row:
    way = WAYS["no-exchange" if left == "gap" else "plain"]
    folder = in_the_gap(scene, runs, way) if left == "gap" else scene.keep_made(runs, way)
    return _counted(lambda at: kill_clean(scene, runs, way, folder, at, again))


def _every_verify(scene: Scene, runs: Machine, *options: object) -> _Row:
    scene.begin(WAYS["plain"])
    assert scene.run(runs, WAYS["plain"]).code == 0
    row = _counted(lambda at: kill_verify(scene, runs, ["verify", scene.out, *options], at))
    assert runs.run("verify", scene.out).code == 0
    assert tree(scene.out) == scene.golden(WAYS["plain"])
    return row


def _lengths(scene: Scene, runs: Machine) -> dict[str, int]:
    """Returns how many calls each way makes."""
    lengths = {}
    for name, way in ALL_WAYS.items():
        scene.begin(way, scene.keep_made(runs, way) if way.made else None)
        assert scene.run(runs, way).code == 0
        lengths[name] = len(runs.calls)
    return lengths


def _doubles(scene: Scene, runs: Machine, lengths: dict[str, int], seeds: range) -> _Row:
    if not lengths:
        lengths.update(_lengths(scene, runs))
    row: _Row = {"tried": 0, "wrong": [], "ways": Counter()}
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(list(ALL_WAYS))
        ats = rng.randrange(1, lengths[name] + 1), rng.randrange(1, lengths[name] + 1)
        try:
            kill_twice(scene, runs, ALL_WAYS[name], ats, rng)
        except AssertionError as error:
            row["wrong"].append(f"{name}, --doubles 1 --seed {seed}: {str(error)[:500]}")
        row["tried"] += 1
        row["ways"][name] += 1
    return row


# So many double kills are written down at a time.
_AT_A_TIME = 25


def _jobs(scene: Scene, runs: Machine, seeds: range) -> Iterator[tuple[str, str, Callable[[], _Row]]]:
    """Yields what there is to do: a way, what is done to it, and how."""
    for name in ALL_WAYS:
        for kind in KINDS if ALL_WAYS[name].processes else list(KINDS)[:2]:
            yield name, kind, lambda name=name, kind=kind: _every_kill(scene, runs, name, kind)
    for left in ("parts", "gap"):
        for again in ("clean", "run"):
            yield f"clean of {left}", f"killed, then {again}", lambda a=(left, again): _every_clean(scene, runs, *a)
    lengths: dict[str, int] = {}
    for n in range(0, len(seeds), _AT_A_TIME):
        some = seeds[n : n + _AT_A_TIME]
        what = f"killed twice, seeds {some.start} to {some.stop - 1}"
        yield "any", what, lambda some=some: _doubles(scene, runs, lengths, some)
    yield "verify", "killed", lambda: _every_verify(scene, runs)
    yield "verify --sources", "killed", lambda: _every_verify(scene, runs, "--sources", scene.plan())


def main() -> None:
    """Kills, and writes down after each kind what there was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--doubles", type=int, default=1000, help="random kills, each of a run that goes on after one")
    parser.add_argument("--seed", type=int, default=0, help="of the first of these; the next follow")
    parser.add_argument("--only", default="", help="of ways whose name has this in it")
    parser.add_argument("--go-on", action="store_true", help="with what the result file does not have yet")
    given = parser.parse_args()
    rows: list[_Row] = json.loads(RESULTS.read_text())["rows"] if given.go_on else []
    there = {(row["way"], row["what"]) for row in rows}
    with machine_in_memory("kills") as (base, runs):
        scene = Scene.set(base / "scene", runs, ALL_WAYS.values())
        for way, what, do in _jobs(scene, runs, range(given.seed, given.seed + given.doubles)):
            if (way, what) in there or given.only not in way:
                continue
            rows.append({"way": way, "what": what, **do()})
            print({**rows[-1], "wrong": rows[-1]["wrong"][:2]}, flush=True)
            write_rows(RESULTS, rows)
        scene.untouched()
    raise SystemExit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
