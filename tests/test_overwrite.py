"""What is at the output path before: whose it is, and what becomes of it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

from tests.faults import tool
from tests.killing import DENY, FAIL, KILL, Machine, Trap
from tests.scene import PARTS, WAYS, Scene, claim, other, tree

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


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR])
def test_what_came_in_the_last_moment(scene: Scene, runs: Machine, number: int) -> None:
    """After the last look, rename(2) itself refuses: a directory, by either number, or a file."""
    made = scene.keep_made(runs, PLAIN)
    scene.begin(PLAIN, made)
    assert scene.run(runs, PLAIN).code == 0
    last = next(n for n, call in enumerate(runs.calls, 1) if call.name == "rename" and call.b == str(scene.out))
    scene.begin(PLAIN, made)
    ran = scene.run(runs, PLAIN, Trap(FAIL, at=last, number=number))
    assert ran.code == 1
    assert ran.json()["errors"][0]["code"] == "output-exists"
    assert scene.run(runs, PLAIN).json()["parts_made"] == 0
    scene.published(PLAIN)


def test_a_rename_that_is_done_and_says_it_was_not(scene: Scene, runs: Machine) -> None:
    """As a file server that gets a request twice, and answers the second. The result is there, so it is published."""
    for way in (PLAIN, OVERWRITE, GAP):
        made = scene.keep_made(runs, way)
        scene.begin(way, made)
        assert scene.run(runs, way).code == 0
        ends = (n for n, call in enumerate(runs.calls, 1) if "/ready-" in call.a and call.b == str(scene.out))
        last = max(ends)
        scene.begin(way, made)
        ran = scene.run(runs, way, Trap(DENY, at=last, number=errno.ENOENT))
        assert runs.hit
        assert ran.code == 0, ran.err
        scene.published(way)


@pytest.mark.parametrize("damage", ["gone", "cut off", "torn receipt", "another receipt"])
def test_a_result_that_was_damaged_is_none(scene: Scene, runs: Machine, damage: str) -> None:
    """It is not said to be there, and it is replaced where that is asked for."""
    scene.begin(PLAIN)
    assert scene.run(runs, PLAIN).code == 0
    file, receipt = scene.out / "model-00001-of-00002.safetensors", scene.out / "shardmerge.json"
    if damage == "gone":
        file.unlink()
    elif damage == "cut off":
        os.truncate(file, file.stat().st_size - 1)
    else:
        receipt.write_text("{" if damage == "torn receipt" else "[]")
    ran = scene.run(runs, PLAIN)
    assert ran.code == 1, ran.err
    assert ran.json()["errors"][0]["code"] == "output-exists"
    assert scene.run(runs, PLAIN, None, "--overwrite").json()["parts_made"] == PARTS
    scene.published(PLAIN)


def test_what_is_made_of_another_plan_stays(scene: Scene, runs: Machine) -> None:
    """It waits beside a result that is there; who asks for that one again finds nothing to do, and nothing of his."""
    scene.begin(OVERWRITE)
    assert scene.run(runs, OVERWRITE).code == 0
    at = claim(runs.calls)
    scene.begin(OVERWRITE)
    assert scene.run(runs, OVERWRITE, Trap(KILL, at=at)).code == KILLED
    again = runs.run("run", scene.plan(other(OVERWRITE.form)), "--out", scene.out, "--json")
    assert again.json()["parts_made"] == 0
    assert scene.seen(OVERWRITE) == "old"
    assert scene.run(runs, OVERWRITE).json()["parts_made"] == 0
    scene.published(OVERWRITE)


@pytest.mark.parametrize("to", ["nothing", "empty", "ours", "file"])
def test_a_link_or_a_file_is_never_replaced(scene: Scene, runs: Machine, to: str) -> None:
    """Said before anything is made. `--overwrite` replaces a directory, and not what leads to one."""
    scene.begin(PLAIN)
    scene.place.mkdir()
    target = scene.place / to
    if to == "empty":
        target.mkdir()
    elif to == "ours":
        shutil.copytree(scene.kept(WAYS["plain"]), target)
    elif to == "file":
        scene.out.write_text("years of work")
    if to != "file":
        scene.out.symlink_to(target)
    before = sorted(scene.place.rglob("*"))
    for more in ((), ("--overwrite",), ("--fresh",), ("--fresh", "--overwrite")):
        if to == "ours" and "--fresh" not in more:
            continue  # it is there already
        ran = scene.run(runs, PLAIN, None, *more)
        assert ran.code == 1, ran.err
        assert ran.json()["errors"][0]["code"] == ("not-ours" if "--overwrite" in more else "output-exists")
        assert sorted(scene.place.rglob("*")) == before
        assert scene.out.is_symlink() == (to != "file")


def test_clean_bears_what_is_at_the_output_path_by_then(scene: Scene, runs: Machine) -> None:
    """Something of somebody else: it stays, also where it came after the last look."""
    _in_the_gap(scene, runs)
    foreign = _foreign(scene)
    assert runs.run("clean", scene.out).code == 0
    assert tree(scene.out) == foreign
    assert [path.name for path in scene.place.iterdir()] == ["out"]
    for number in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        _in_the_gap(scene, runs)
        assert runs.run("clean", scene.out, trap=Trap(FAIL, at=2, number=number)).code == 0
        assert list(scene.place.iterdir()) == []  # it was put back nowhere


def test_what_cannot_be_put_back_is_not_removed(scene: Scene, runs: Machine) -> None:
    _in_the_gap(scene, runs)
    ran = runs.run("clean", scene.out, trap=Trap(FAIL, at=2, number=errno.EIO))
    assert (ran.code, runs.hit) == (1, 1)
    scene.out.mkdir()  # nothing that it would have to make room for
    assert runs.run("clean", scene.out).code == 0
    assert scene.seen(GAP) == "old"
    assert [path.name for path in scene.place.iterdir()] == ["out"]


def test_clean_follows_no_link(scene: Scene, runs: Machine) -> None:
    scene.begin(PLAIN, scene.keep_made(runs, PLAIN))
    assert scene.staging is not None
    (scene.staging / "model" / "link").symlink_to(scene.inputs)
    assert runs.run("clean", scene.out).code == 0
    assert list(scene.place.iterdir()) == []
    scene.untouched()


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


def _without_privileges(scene: Scene) -> subprocess.CompletedProcess[str]:
    """Runs the command as an owner whom the modes of his directories bind, which root's do not."""
    bound = ["--bounding-set=-dac_override,-dac_read_search", sys.executable, "-m", "shardmerge"]
    command = [tool("setpriv"), *bound, *map(str, scene.command(PLAIN))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_directory_that_its_owner_may_not_write_to_lends_its_mode(scene: Scene, runs: Machine) -> None:
    """Whoever may not write to a directory may not move it to another."""
    scene.begin(PLAIN)
    scene.out.mkdir(parents=True)
    scene.out.chmod(0o555)
    done = _without_privileges(scene)
    assert done.returncode == 0, done.stderr
    scene.published(PLAIN)
    assert scene.out.stat().st_mode & 0o7777 == 0o555


def test_a_place_that_may_not_be_written_to_is_named_before_anything_is_made(scene: Scene, runs: Machine) -> None:
    scene.begin(PLAIN)
    scene.place.mkdir()
    scene.place.chmod(0o555)
    done = _without_privileges(scene)
    assert done.returncode == 1
    assert "no permission to write here [unwritable-output]" in done.stderr
    assert f"at: {scene.place}\n" in done.stderr


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
