"""Power cuts at any call, on file systems of several kinds: ``python -m tests.cuts``.

It writes ``tests/soak/power-cuts.json``. Every way to make a result is run on a disk that loses its power before one of
its calls that change a file, or right after it said that it did well; and what became of the journal is drawn too.

Then the output path holds nothing, or what it held before, or the whole result, which it is where the command had ended
with exit code 0; the sources are what they were; and a file that was being written is refused by its reader, or whole.
The same command makes the result, with no part made again that was committed, and leaves nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tests.campaigns import machine_in_memory, write_rows
from tests.killing import Call, Machine
from tests.power import DISKS, JOURNAL_KEPT, JOURNAL_LOST, PoweredDisk, powered_disk
from tests.scene import ALL_WAYS, Scene, Way

RESULTS = Path(__file__).parent / "soak" / "power-cuts.json"

JOURNALS = {"lost": JOURNAL_LOST, "kept": JOURNAL_KEPT}
# After a power cut it is another boot, which receipts of parts that were not synced do not survive.
_LATER = "the next boot"


def cut(  # what is run, and when it loses its power
    scene: Scene, disk: PoweredDisk, runs: Machine, way: Way, at: int,
    made: Path | None = None, journal: int = JOURNAL_LOST, skip: int = 0,
) -> bool:  # fmt: skip
    """Cuts the power before a call, or after the end, and checks what is there; tells whether it was the end.

    Parameters
    ----------
    made
        With what the place begins.
    journal
        What becomes of it, see ``power``.
    skip
        A call that is not made, and said to have succeeded.
    """
    scene.begin(way, made)
    disk.settle()
    first = scene.run(runs, way, disk.trap(at, journal, skip))
    ended = not runs.hit
    assert first.code == (0 if ended else -9), first.err
    assert runs.hit in (0, 1), os.strerror(-runs.hit)
    committed = scene.parts(way) if made else _committed(runs.calls)
    disk.cut(journal)
    seen = scene.seen(way)
    if not seen and way.before:
        scene.in_the_gap(way)
    assert seen == "new" or not ended, "the command ended with exit code 0, and its result is lost"
    _nothing_looks_whole(scene, way)
    again = scene.go_on(runs, way, boot=_LATER)
    assert again <= (0 if seen == "new" else scene.parts(way) - committed), "a part that was committed is lost"
    scene.published(way)
    return ended


def _committed(calls: list[Call]) -> int:
    """Returns how many parts a run had committed: its last step is to sync the directory of the receipts.

    A receipt that was not synced itself is one of --no-sync.
    """
    found, pending, synced = 0, 0, set[str]()
    for call in calls:
        if call.name == "rename" and re.search(r"/parts/\d{5}\.json$", call.b):
            pending += call.a in synced
        elif call.name == "fsync" and call.a.endswith("/parts"):
            found, pending = found + pending, 0
        elif call.name == "fsync":
            synced.add(call.a)
    return found


def _nothing_looks_whole(scene: Scene, way: Way) -> None:
    """A file that was being written is refused by its reader, or is whole.

    A file of torch is a zip, whose first bytes say so; a reader of safetensors takes a length of zero for no header.
    """
    whole = {data for data in scene.golden(way).values() if data}
    for path in scene.place.glob("out.partial-*/parts/?????.*.tmp"):
        data = path.read_bytes()
        if way.form != "safetensors":
            assert not data.startswith(b"PK") or data in whole, path.name
            continue
        try:
            with safe_open(path, "np"):
                assert data in whole, path.name
        except SafetensorError:
            continue


# --- many of them ---

_Row = dict[str, Any]


def _lengths(scene: Scene, runs: Machine) -> dict[str, int]:
    """Returns how many calls each way makes, from where it begins."""
    found = {}
    for name, way in ALL_WAYS.items():
        scene.begin(way, _made(scene, runs, way))
        assert scene.run(runs, way).code == 0
        found[name] = len(runs.calls)
    return found


def _made(scene: Scene, runs: Machine, way: Way) -> Path | None:
    return scene.keep_made(runs, way) if way.made else None


def _cuts(runs: Machine, name: str, seeds: range) -> Iterator[_Row]:
    """Cuts, and yields what there was after every few cuts."""
    row: _Row = {"disk": name, "options": DISKS[name].options, "cuts": 0, "wrong": [], "cloned": 0}
    row |= {"ended": 0, "ways": Counter(), "journal": Counter()}
    with powered_disk(name) as disk:
        scene = Scene.set(disk.root / "scene", runs, ALL_WAYS.values())
        scene.begin(ALL_WAYS["blocks"])
        row["cloned"] = scene.run(runs, ALL_WAYS["blocks"]).json()["bytes_cloned"]
        lengths = _lengths(scene, runs)
        for seed in seeds:
            rng = random.Random(seed)
            way = rng.choice(list(ALL_WAYS))
            # One in ten after the end.
            at = rng.randrange(1, lengths[way] + 1) if rng.random() < 0.9 else lengths[way] + 100
            journal = rng.choice(list(JOURNALS))
            made = _made(scene, runs, ALL_WAYS[way])
            try:
                row["ended"] += cut(scene, disk, runs, ALL_WAYS[way], at, made, JOURNALS[journal])
            except AssertionError as error:
                row["wrong"].append(f"{way}, --seed {seed}: {str(error)[:500]}")
                print(name, row["wrong"][-1], flush=True)
            row["cuts"] += 1
            row["ways"][way] += 1
            row["journal"][journal] += 1
            if row["cuts"] % 20 == 0:
                yield row
        scene.untouched()
    yield row


def main() -> None:
    """Cuts, and writes down what there was as it goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=400, help="of each kind of disk")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next follow")
    parser.add_argument("--only", default="", help="of disks whose name has this in it")
    given = parser.parse_args()
    kept = json.loads(RESULTS.read_text())["rows"] if given.only and RESULTS.exists() else []
    rows = {row["disk"]: row for row in kept}
    with machine_in_memory("cuts") as (_, runs):
        for name in DISKS:
            if given.only in name:
                for row in _cuts(runs, name, range(given.seed, given.seed + given.cuts)):
                    rows[name] = row
                    write_rows(RESULTS, list(rows.values()))
                print({**row, "wrong": row["wrong"][:2]}, flush=True)
    raise SystemExit(any(row["wrong"] for row in rows.values()))


if __name__ == "__main__":
    main()
