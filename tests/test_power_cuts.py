"""A power cut at any moment: the output path holds nothing or all, and what was committed is still there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash_model import Disk, Node
from tests.cuts import cut
from tests.killing import KILL, Call, Machine, Trap
from tests.power import PoweredDisk, powered_disk
from tests.scene import WAYS, Scene, Way, claim
from tests.syncs import SITES, broken, names, points, sites

# --- on a disk that keeps no more than it must ---


@pytest.fixture(scope="module")
def traces(scene: Scene, runs: Machine) -> dict[str, list[Call]]:
    """The calls of an undisturbed run."""
    found = {}
    for name, way in WAYS.items():
        if way.form == "safetensors" and not (way.before == "empty" and os.geteuid()):
            scene.begin(way)
            assert scene.run(runs, way).code == 0
            found[name] = runs.calls
    return found


def test_no_promise_is_broken(scene: Scene, traces: dict[str, list[Call]]) -> None:
    for way, calls in traces.items():
        assert broken(scene, WAYS[way], calls) == [], way


def test_whoever_writes_a_file_made_it(traces: dict[str, list[Call]]) -> None:
    """A name that is there already, a link for one, is not written to."""
    for calls in traces.values():
        opened = [call for call in calls if call.name == "open"]
        assert len(opened) > 15
        assert all(call.y == os.O_EXCL for call in opened)


def test_every_sync_is_needed(scene: Scene, traces: dict[str, list[Call]]) -> None:
    """Without any one of them a promise would be broken: none is made in vain, and none can go without being missed.

    But for directories that were there before: somebody who was killed may just have made them, see below.
    """
    for way, calls in traces.items():
        scene.begin(WAYS[way])
        there = (scene.place if scene.place.exists() else scene.root).parents
        syncs = [n for n, call in enumerate(calls) if call.name == "fsync"]
        assert len(syncs) > 30
        for at in syncs:
            assert Path(calls[at].a) in there or broken(scene, WAYS[way], calls[:at] + calls[at + 1 :]), (
                f"{way}: {calls[at].a}"
            )


def test_every_function_that_syncs_is_known() -> None:
    """What `python -m tests.syncs` leaves out in turn is all that there is."""
    assert sites() == set(SITES.values())


def test_nor_by_who_goes_on_after_a_kill(scene: Scene, runs: Machine, traces: dict[str, list[Call]]) -> None:
    """What a killed run has not synced any more, nobody may take for synced.

    But for the part that was being committed: it may have to be made again.
    """
    for at in (*range(1, 18), *range(18, len(traces["plain"]), 5)):
        scene.begin(WAYS["plain"])
        before = Node.of(scene.root)
        assert scene.run(runs, WAYS["plain"], Trap(KILL, at=at)).code == -9
        calls = runs.calls
        assert scene.run(runs, WAYS["plain"]).code == 0
        found = list(Disk(scene.root, before, scene.out, names(traces["plain"])).broken(calls + runs.calls))
        assert [one for one in found if "committed" not in one or "begun.json" in one] == [], at


def test_parts_that_were_made_without_a_sync(scene: Scene, runs: Machine) -> None:
    """Whoever publishes them syncs them, and the directories that were made for them; each of these syncs is needed."""
    making, finishing = Way(steps=(("run", "--no-sync"),)), Way(steps=(("finish",),))
    scene.begin(making)
    assert scene.run(runs, making).code == 0
    at, files = claim(runs.calls), names(runs.calls)
    scene.begin(making)
    before = Node.of(scene.root)
    assert scene.run(runs, making, Trap(KILL, at=at)).code == -9
    made = runs.calls
    assert scene.run(runs, finishing).code == 0

    def lost(calls: list[Call]) -> list[str]:
        found = Disk(scene.root, before, scene.out, files).broken(made + calls)
        return [one for one in found if not one.startswith("part ")]

    assert lost(runs.calls) == []
    syncs = [n for n, call in enumerate(runs.calls) if call.name == "fsync" and Path(call.a) not in scene.root.parents]
    assert len(syncs) > 10
    for n in syncs:
        again = runs.calls[n].a in [call.a for call in runs.calls[:n] if call.name == "fsync"]
        assert again or lost(runs.calls[:n] + runs.calls[n + 1 :]), runs.calls[n].a


# --- on ext4 ---


@pytest.fixture(scope="module")
def disk() -> Iterator[PoweredDisk]:
    with powered_disk() as found:
        yield found


@pytest.fixture(scope="module")
def powered(disk: PoweredDisk, runs: Machine) -> Scene:
    return Scene.set(disk.root / "scene", runs)


def test_power_cut_at_every_other_step(powered: Scene, disk: PoweredDisk, runs: Machine) -> None:
    powered.begin(WAYS["plain"])
    assert powered.run(runs, WAYS["plain"]).code == 0
    steps = points(runs.calls)
    assert len(steps) > 60
    for at in steps[::2]:
        assert not cut(powered, disk, runs, WAYS["plain"], at)


@pytest.mark.parametrize("way", ["overwrite", "no-exchange", "empty"])
def test_power_cut_while_it_is_published(powered: Scene, disk: PoweredDisk, runs: Machine, way: str) -> None:
    made = powered.keep_made(runs, WAYS[way])
    powered.begin(WAYS[way], made)
    assert powered.run(runs, WAYS[way]).code == 0
    last = next(
        n for n, call in enumerate(runs.calls, 1) if call.name == "rename" and call.b.endswith("shardmerge.json")
    )
    cuts = 0
    while not cut(powered, disk, runs, WAYS[way], last + cuts, made):
        cuts += 1
    assert cuts > 10
