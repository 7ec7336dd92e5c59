"""What is at the output path before: whose it is, and what becomes of it."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from tests.killing import FAIL, KILL, Machine, Trap
from tests.scene import PARTS, WAYS, Scene, other, tree

OVERWRITE, GAP, PLAIN = WAYS["overwrite"], WAYS["no-exchange"], WAYS["plain"]
KILLED = -9


def _in_the_gap(scene: Scene, runs: Machine) -> None:
    """Kills a run after it put the old directory aside, and before the new one is in its place."""
    made = scene.keep_made(runs, GAP)
    scene.begin(GAP, made)
    assert scene.run(runs, GAP).code == 0
    gap = next(n for n, call in enumerate(runs.calls, 1) if call.name == "rename" and call.a == str(scene.out)) + 1
    scene.begin(GAP, made)
    assert scene.run(runs, GAP, Trap(KILL, at=gap)).code == -9
    assert scene.seen(GAP) == ""
    scene.in_the_gap(GAP)


def test_clean_gives_back_what_was_put_aside(scene: Scene, runs: Machine) -> None:
    _in_the_gap(scene, runs)
    assert runs.run("clean", scene.out).code == 0
    assert scene.seen(GAP) == "old"
    assert [path.name for path in scene.place.iterdir()] == ["out"]


def test_clean_killed_anywhere_gives_it_back_when_it_is_called_again(scene: Scene, runs: Machine) -> None:
    at = 0
    while True:
        at += 1
        _in_the_gap(scene, runs)
        ran = runs.run("clean", scene.out, trap=Trap(KILL, at=at))
        assert scene.seen(GAP) in ("", "old")
        assert runs.run("clean", scene.out).code == 0
        assert scene.seen(GAP) == "old"
        assert [path.name for path in scene.place.iterdir()] == ["out"]
        if ran.code == 0:
            break
    assert at > 10


def test_a_plan_that_is_not_its_gives_it_back_first(scene: Scene, runs: Machine) -> None:
    """Another run, told to begin anew: the old directory is there again until that run replaces it."""
    _in_the_gap(scene, runs)
    ran = runs.run("run", scene.plan(other(GAP.form)), "--out", scene.out, "--json")
    assert ran.json()["errors"][0]["code"] == "other-plan-staged"
    fresh = ["run", scene.plan(other(GAP.form)), "--out", scene.out, "--fresh", "--overwrite", "--json"]
    assert runs.run(*fresh, trap=Trap(KILL, at=60)).code == KILLED
    assert scene.seen(GAP) == "old"
    assert runs.run(*fresh).json()["parts_made"] == PARTS
    assert scene.seen(GAP) == "old"  # it had been this one's result
    assert [path.name for path in scene.place.iterdir()] == ["out"]


def _foreign(scene: Scene) -> dict[str, bytes | None]:
    """Puts something of somebody else at the output path."""
    if scene.out.exists():
        shutil.rmtree(scene.out)
    scene.out.mkdir(parents=True)
    (scene.out / "thesis.tex").write_text("years of work")
    return tree(scene.out)


@pytest.mark.parametrize("command", ["run", "finish"])
@pytest.mark.parametrize("way", ["plain", "overwrite"])
def test_what_came_to_the_output_path_meanwhile(scene: Scene, runs: Machine, way: str, command: str) -> None:
    """It is looked at again right before the result is renamed to it, also by `finish`."""
    scene.begin(PLAIN, scene.keep_made(runs, PLAIN))
    before = _foreign(scene)
    ran = runs.run(command, scene.plan(), "--out", scene.out, *WAYS[way].arguments, "--json")
    assert ran.code == 1, ran.err
    assert ran.json()["errors"][0]["code"] == ("not-ours" if way == "overwrite" else "output-exists")
    assert tree(scene.out) == before
    shutil.rmtree(scene.out)
    assert scene.run(runs, PLAIN).json()["parts_made"] == 0
    scene.published(PLAIN)


def test_what_came_in_the_last_moment(scene: Scene, runs: Machine) -> None:
    """After the last look, rename(2) itself refuses."""
    made = scene.keep_made(runs, PLAIN)
    scene.begin(PLAIN, made)
    assert scene.run(runs, PLAIN).code == 0
    last = next(n for n, call in enumerate(runs.calls, 1) if call.name == "rename" and call.b == str(scene.out))
    scene.begin(PLAIN, made)
    ran = scene.run(runs, PLAIN, Trap(FAIL, at=last, number=errno.ENOTEMPTY))
    assert ran.code == 1
    assert ran.json()["errors"][0]["code"] == "output-exists"
    assert scene.run(runs, PLAIN).json()["parts_made"] == 0
    scene.published(PLAIN)


def test_an_exchange_that_fails_leaves_the_old_directory(scene: Scene, runs: Machine) -> None:
    """Both names of it: by renameat2, and where there is none by two renames of which the second fails."""
    for way, failing in ((OVERWRITE, 1), (GAP, 2)):
        made = scene.keep_made(runs, way)
        scene.begin(way, made)
        assert scene.run(runs, way).code == 0
        swaps = [n for n, call in enumerate(runs.calls, 1) if str(scene.out) in (call.a, call.b)]
        scene.begin(way, made)
        ran = scene.run(runs, way, Trap(FAIL, at=swaps[failing - 1], number=errno.EIO))
        assert ran.code == 1, ran.err
        assert scene.seen(way) == "old"
        assert scene.run(runs, way).json()["parts_made"] == 0
        scene.published(way)


@pytest.mark.parametrize("mode", [0o555, 0o700, 0o1777, 0o2770])
def test_an_empty_directory_lends_its_mode(scene: Scene, runs: Machine, mode: int) -> None:
    scene.begin(PLAIN)
    scene.out.mkdir(parents=True)
    scene.out.chmod(mode)
    os.setxattr(scene.out, "user.project", b"llava")
    assert scene.run(runs, PLAIN).code == 0
    scene.published(PLAIN)
    assert scene.out.stat().st_mode & 0o7777 == mode
    assert os.getxattr(scene.out, "user.project") == b"llava"


def test_nobody_else_sees_it_meanwhile(scene: Scene, runs: Machine) -> None:
    """A directory that only its owner may read is so at every call."""
    scene.begin(PLAIN)
    scene.out.mkdir(parents=True)
    scene.out.chmod(0o700)
    assert scene.run(runs, PLAIN).code == 0
    for at in [n for n, call in enumerate(runs.calls, 1) if call.b == str(scene.out) or call.a == str(scene.out)]:
        for killed in (at, at + 1):
            scene.begin(PLAIN)
            scene.out.mkdir(parents=True)
            scene.out.chmod(0o700)
            scene.run(runs, PLAIN, Trap(KILL, at=killed))
            assert scene.out.stat().st_mode & 0o7777 == 0o700
