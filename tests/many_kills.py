"""More accidents than the test suite has time for: ``python -m tests.many_kills --doubles 1000``.

Each line of the answer says what was done how often. The first thing that goes wrong ends it, and gives its seed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import tool
from tests.killing import HALF, KILL, KILL_ALL, Machine, Trap, machine
from tests.power import WRITEBACK, powered_disk
from tests.scene import PARTS, WAYS, Scene
from tests.test_kills import kill_and_go_on
from tests.test_power_cuts import cut
from tests.test_races import anybody_at_anything

# More calls than any run makes.
_CALLS = 190


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", action="store_true", help="a kill at every call, and in every write, in every way")
    parser.add_argument("--doubles", type=int, default=0, help="random kills, each of a run that goes on after one")
    parser.add_argument("--cuts", type=int, default=0, help="power cuts at random calls, on ext4 in two modes")
    parser.add_argument("--races", type=int, default=0, help="random schedules of random commands")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next follow")
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="shardmerge-many-", dir="/dev/shm"))
    try:
        with machine(base, tool("gcc")) as runs:
            scene = Scene.set(base / "scene", runs)
            if given.every:
                _told("kills at every call", lambda: _every(scene, runs))
            seeds = lambda count: range(given.seed, given.seed + count)  # noqa: E731
            _told("double kills", lambda: sum(_double(scene, runs, seed) for seed in seeds(given.doubles)))
            _told("races", lambda: sum(_race(scene, runs, seed) for seed in seeds(given.races)))
            for options in (WRITEBACK, "data=ordered") if given.cuts else ():
                _told(f"power cuts, {options}", lambda o=options: _cuts(runs, o, seeds(given.cuts)))
            scene.untouched()
    finally:
        shutil.rmtree(base)


def _told(what: str, do: Callable[[], int]) -> None:
    started = time.monotonic()
    count = do()
    if count:
        print(f"{count} {what}: nothing went wrong ({time.monotonic() - started:.0f} s)", flush=True)


def _every(scene: Scene, runs: Machine) -> int:
    count = 0
    for way in WAYS:
        for action in (KILL, HALF):
            at = 1
            while not kill_and_go_on(scene, runs, way, Trap(action, at=at)):
                at += 1
            count += at - 1
    return count


def _double(scene: Scene, runs: Machine, seed: int) -> int:
    """Kills a run, then the one that goes on; the third comes to its end."""
    rng = random.Random(seed)
    way = WAYS[rng.choice(list(WAYS))]
    scene.begin(way)
    kept = 0
    try:
        for _ in range(2):
            trap = Trap(rng.choice([KILL_ALL, HALF]), at=rng.randrange(1, _CALLS))
            ran = scene.run(runs, way, trap, processes=rng.random() < 0.3)
            assert ran.code in (0, -9, 4), ran.err
            assert scene.stopped(way) >= kept, "a part that was made is lost"
            kept = scene.stopped(way)
        there = scene.seen(way) == "new"
        last = scene.run(runs, way)
        assert last.code == 0, last.err
        assert last.json()["parts_made"] == (0 if there else PARTS - kept)
        scene.published(way)
    except AssertionError as error:
        raise AssertionError(f"--doubles 1 --seed {seed}") from error
    return 1


def _race(scene: Scene, runs: Machine, seed: int) -> int:
    try:
        anybody_at_anything(scene, runs, seed)
    except AssertionError as error:
        raise AssertionError(f"--races 1 --seed {seed}") from error
    return 1


def _cuts(runs: Machine, options: str, seeds: range) -> int:
    with powered_disk(options) as disk:
        scene = Scene.set(disk.root / "scene", runs)
        for seed in seeds:
            rng = random.Random(seed)
            way = WAYS[rng.choice(["plain", "overwrite", "no-exchange", "empty"])]
            try:
                cut(scene, disk, runs, way, rng.randrange(1, _CALLS))
            except AssertionError as error:
                raise AssertionError(f"--cuts 1 --seed {seed}") from error
    return len(seeds)


if __name__ == "__main__":
    main()
