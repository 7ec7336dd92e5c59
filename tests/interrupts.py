"""Interrupts the Python API before a random step: ``python -m tests.interrupts --runs 1000``.

Python runs the handler of a signal between two of its steps (opcodes), so ``KeyboardInterrupt`` is raised before one of
them. After each the process has the same files open as before, once its threads are done; the output path holds
nothing or the whole result; the same call then makes the result, and leaves nothing beside it.
``tests/soak/interrupts.json`` has the counts.

Only the main thread is interrupted, as by a signal. Of one in a finalizer Python says that it is ignored.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import shardmerge as sm
from tests.campaigns import write_rows
from tests.conftest import GOLDEN
from tests.day.api_process import descriptors
from tests.scene import Tree, tree

RESULTS = Path(__file__).parent / "soak" / "interrupts.json"

SOURCES = {
    "safetensors": GOLDEN / "layouts/phi3_to_llama_gqa/source",
    "ZeRO-2": GOLDEN / "zero/llama_z2_w2_bf16/ckpt",
    "ZeRO-3": GOLDEN / "zero/llama_z3_w2_bf16/ckpt",
    "universal": GOLDEN / "universal/bag_z2_w3_bf16/ckpt",
    "DCP": GOLDEN / "dcp/fsdp2_w2_bf16/ckpt",
}
# Where the steps are that are drawn, a quarter each: most of all steps are those of planning.
ROOMS = ("/shardmerge/", "/shardmerge/storage/", "/shardmerge/execute/", "/shardmerge/publish/")

# How long a thread may wait for the disk, in seconds.
_LONGEST = 30.0


class Steps:
    """Counts the steps of frames whose file has a part of a path in its name; raises before one of a number."""

    def __init__(self, where: str, stop: int = -1) -> None:
        self.count, self._where, self._stop = 0, where, stop

    def __call__(self, frame: FrameType, event: str, given: Any) -> Any:
        if self._where not in frame.f_code.co_filename or _ends(frame) or _ends(frame.f_back):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count - 1 == self._stop:
                raise KeyboardInterrupt
        return self


def _ends(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_name == "__del__"


def stepped(work: Callable[[], object], steps: Steps) -> str:
    """Does the work while steps are counted, and returns the code of what ended it, ``""`` for nothing."""
    before = sys.gettrace()
    sys.settrace(steps)
    try:
        work()
    except KeyboardInterrupt:
        return "interrupted"
    except sm.ShardmergeError as error:
        return error.code
    finally:
        sys.settrace(before)
    return ""


@dataclass(frozen=True)
class Scene:
    """A call of the API, and what it makes when nothing disturbs it."""

    work: Callable[[], object]
    place: Path
    golden: Tree
    steps: dict[str, int]

    def interrupted(self, room: str, step: int) -> str:
        """Interrupts the call before a step, and returns what became of it; raises AssertionError for what is wrong."""
        before, others = descriptors(), threading.enumerate()
        code = stepped(self.work, Steps(room, step))
        for thread in threading.enumerate():
            if thread not in others:
                thread.join(_LONGEST)
        assert code in ("interrupted", "durability-unconfirmed"), code
        left = {number: name for number, name in descriptors().items() if number not in before}
        assert not left, left
        if not (self.place / "out").exists():
            self.work()
            code = "nothing published"
        elif code == "interrupted":
            code = "published"
        assert tree(self.place) == self.golden, "another result, or something beside it"
        shutil.rmtree(self.place / "out")
        return code


def conversion(name: str, place: Path) -> Scene:
    """A conversion to another type by two threads."""
    place.mkdir()
    options = sm.Options(dtype="float16", workers=2, shard_size=50_000)
    work = partial(sm.convert, SOURCES[name], place / "out", options=options)
    work()  # what is imported once is imported now
    shutil.rmtree(place / "out")
    counts = {}
    for room in ROOMS:
        steps = Steps(room)
        assert stepped(work, steps) == ""
        counts[room] = steps.count
        golden = tree(place)
        shutil.rmtree(place / "out")
    return Scene(work, place, golden, counts)


def interrupts(scene: Scene, runs: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yields the steps that were interrupted, with what became of each call; ``wrong: ...`` for what must not be."""
    rng = random.Random(seed)
    for number in range(runs):
        room = ROOMS[number % len(ROOMS)]
        step = rng.randrange(scene.steps[room])
        try:
            yield f"{room} {step}", scene.interrupted(room, step)
        except Exception as error:  # noqa: BLE001  # the next one begins anew
            shutil.rmtree(scene.place)
            scene.place.mkdir()
            yield f"{room} {step}", f"wrong: {error!r}"


def main() -> None:
    """Counts, and writes the result file after each kind of source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows: list[dict[str, object]] = []
    for number, name in enumerate(SOURCES):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
            scene = conversion(name, Path(base, "place"))
            counts: Counter[str] = Counter()
            wrong = []
            for step, what in interrupts(scene, given.runs // len(SOURCES), given.seed + number):
                counts[what.partition(":")[0]] += 1
                if what.startswith("wrong"):
                    wrong.append(f"{step}: {what}")
                    print(name, wrong[-1], flush=True)
        rows.append(
            {"source": name, "steps": scene.steps[ROOMS[0]], "outcomes": dict(sorted(counts.items())), "wrong": wrong}
        )
        print(rows[-1], flush=True)
        write_rows(given.out, rows)


if __name__ == "__main__":
    main()
