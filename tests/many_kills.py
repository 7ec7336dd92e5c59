"""More schedules than the test suite has time for: ``python -m tests.many_kills --races 500``.

The first thing that goes wrong ends it, and gives its seed. Kills and power cuts are in ``kills`` and ``cuts``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from tests.faults import tool
from tests.killing import Machine, machine
from tests.scene import Scene
from tests.test_races import anybody_at_anything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=0, help="random schedules of random commands")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next follow")
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="shardmerge-many-", dir="/dev/shm"))
    started = time.monotonic()
    try:
        with machine(base, tool("gcc")) as runs:
            scene = Scene.set(base / "scene", runs)
            for seed in range(given.seed, given.seed + given.races):
                _race(scene, runs, seed)
            scene.untouched()
    finally:
        shutil.rmtree(base)
    print(f"{given.races} races: nothing went wrong ({time.monotonic() - started:.0f} s)", flush=True)


def _race(scene: Scene, runs: Machine, seed: int) -> None:
    try:
        anybody_at_anything(scene, runs, seed)
    except AssertionError as error:
        raise AssertionError(f"--races 1 --seed {seed}") from error


if __name__ == "__main__":
    main()
