"""A run that is told to stop, wherever it is, and whatever the disk does meanwhile."""

from __future__ import annotations

import errno
import shlex
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.killing import FAIL, KILL, KILL_PARENT, RAISE, Machine, Ran, Trap
from tests.scene import INDEX, PARTS, WAYS, Scene

PLAIN = WAYS["plain"]
STOPS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU, signal.SIGQUIT,
    signal.SIGALRM,
)  # fmt: skip

# How long a disk does not answer, in ms, and from how many seconds on a run has waited for it.
FOREVER, TOO_LONG = 60_000, 30


@pytest.fixture(scope="module")
def calls(scene: Scene, runs: Machine) -> list[str]:
    """An undisturbed run, as lines."""
    scene.begin(PLAIN)
    assert scene.run(runs, PLAIN).code == 0
    return [f"{call.name} {call.a} {call.b}" for call in runs.calls]


def commit(calls: list[str], scene: Scene) -> int:
    """The number of the call, from 1, that publishes."""
    return next(n for n, call in enumerate(calls, 1) if call.startswith("rename ") and call.endswith(f" {scene.out}"))


def _stopped_cleanly(scene: Scene, runs: Machine, ran: Ran) -> None:
    """Nothing is published or half written, what was made is kept, and the line that is said goes on from there."""
    assert ran.code == 5, ran.err
    assert "[interrupted]" in ran.err
    assert "Traceback" not in ran.err
    assert ran.json()["errors"][0]["code"] == "interrupted"
    receipts = scene.stopped(PLAIN)
    assert scene.seen(PLAIN) == ""
    assert not list(scene.place.rglob("*.tmp"))
    line = next(line for line in ran.err.splitlines() if "to go on: " in line).split("to go on: ")[1]
    again = runs.run(*shlex.split(line)[1:])
    assert again.code == 0, again.err
    assert again.json()["parts_made"] == PARTS - receipts
    scene.published(PLAIN)


def test_a_signal_at_any_call(scene: Scene, runs: Machine, calls: list[str]) -> None:
    last, claim = commit(calls, scene), next(n for n, call in enumerate(calls, 1) if "/ready-" in call)
    for at in range(1, last + 1, 4):
        scene.begin(PLAIN)
        number = STOPS[at // 4 % len(STOPS)]
        ran = scene.run(runs, PLAIN, Trap(RAISE, at=at, number=number))
        if at > claim and ran.code == 0:  # it was about to publish, and was faster
            scene.published(PLAIN)
        else:
            _stopped_cleanly(scene, runs, ran)


def test_a_signal_after_the_commit(scene: Scene, runs: Machine, calls: list[str]) -> None:
    """What was to be done is done: the run says so, or what is not sure, and never that nothing was published."""
    last = commit(calls, scene)
    for at in range(last + 1, len(calls) + 1):
        scene.begin(PLAIN)
        ran = scene.run(runs, PLAIN, Trap(RAISE, at=at, number=signal.SIGTERM))
        assert ran.code == 0, ran.err
        scene.published(PLAIN)


def test_signals_that_come_again(scene: Scene, runs: Machine, calls: list[str]) -> None:
    """Slurm sends SIGTERM twice; a second one does not end the ending."""
    for number in STOPS:
        scene.begin(PLAIN)
        ran = scene.run(runs, PLAIN, Trap(RAISE, at=40, until=10_000, number=number))
        _stopped_cleanly(scene, runs, ran)


def _slow(calls: list[str], scene: Scene) -> Iterator[int]:
    """Yields syncs of each kind: of what begins, data, header, names, receipts, side files."""
    seen = set()
    for n, call in enumerate(calls[: commit(calls, scene)], 1):
        kind = call.replace(str(scene.root), "").split(".partial-")[-1].partition("/")[2].rstrip("0123456789")
        kind = "/".join(part.split(".")[0].rstrip("0123456789") for part in kind.split("/"))
        if call.startswith("fsync ") and (kind, calls[n - 2][:6]) not in seen:
            seen.add((kind, calls[n - 2][:6]))
            yield n


def test_a_signal_while_the_disk_does_not_answer(scene: Scene, runs: Machine, calls: list[str]) -> None:
    slow = list(_slow(calls, scene))
    assert len(slow) > 5
    for at in slow[:8]:
        scene.begin(PLAIN)
        ran = scene.run(runs, PLAIN, Trap(RAISE, at=at, number=signal.SIGTERM, slow_ms=FOREVER))
        assert ran.seconds < TOO_LONG
        _stopped_cleanly(scene, runs, ran)


def test_a_signal_while_parts_are_looked_at(scene: Scene, runs: Machine, calls: list[str]) -> None:
    """There may be thousands, to be read whole: no other one is looked at, and nothing is put beside them."""
    scene.begin(PLAIN)
    at = next(n for n, call in enumerate(calls, 1) if call.startswith("utimens "))
    ran = scene.run(runs, PLAIN, Trap(RAISE, at=at, number=signal.SIGTERM, slow_ms=1000))
    assert scene.staging is not None
    assert not list(scene.staging.rglob(INDEX))
    _stopped_cleanly(scene, runs, ran)


def test_a_signal_while_the_name_is_not_on_the_disk_yet(scene: Scene, runs: Machine, calls: list[str]) -> None:
    scene.begin(PLAIN)
    trap = Trap(RAISE, at=commit(calls, scene) + 1, number=signal.SIGTERM, slow_ms=FOREVER)
    ran = scene.run(runs, PLAIN, trap)
    assert ran.seconds < TOO_LONG
    _unconfirmed(scene, runs, ran)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_sync_that_fails_after_the_commit(scene: Scene, runs: Machine, calls: list[str], code: int) -> None:
    scene.begin(PLAIN)
    _unconfirmed(scene, runs, scene.run(runs, PLAIN, Trap(FAIL, at=commit(calls, scene) + 1, number=code)))


def _unconfirmed(scene: Scene, runs: Machine, ran: Ran) -> None:
    assert ran.code == 6, ran.err
    assert "[durability-unconfirmed]" in ran.err
    assert "published before" not in ran.err
    assert scene.seen(PLAIN) == "new"
    again = runs.run(*scene.command(PLAIN)[:-1])  # without --json
    assert "there already, nothing to do\n" in again.out
    scene.published(PLAIN)


def test_what_cannot_be_tidied_is_said(scene: Scene, runs: Machine, calls: list[str]) -> None:
    first = next(n for n, call in enumerate(calls, 1) if call.startswith("unlink ") and "partial-gone" in call)
    scene.begin(PLAIN)
    ran = scene.run(runs, PLAIN, Trap(FAIL, at=first, until=10_000, number=errno.EACCES))
    assert ran.code == 6
    error = ran.json()["errors"][0]
    assert error["code"] == "not-tidied"
    assert scene.seen(PLAIN) == "new"
    shutil.rmtree(error["where"])
    scene.published(PLAIN)


def test_nohup_is_heard(scene: Scene, runs: Machine, calls: list[str]) -> None:
    scene.begin(PLAIN)
    trap = Trap(RAISE, at=len(calls) // 2, number=signal.SIGHUP)
    assert scene.run(runs, PLAIN, trap, ignore=[signal.SIGHUP]).code == 0
    scene.published(PLAIN)


# --- several processes ---


def test_a_signal_to_all_processes(scene: Scene, runs: Machine, calls: list[str]) -> None:
    """As a terminal and a batch system send it: the parent alone decides, and leaves nobody behind."""
    last = commit(calls, scene) - 20  # by then parts are made
    for at in range(10, last, 13):
        scene.begin(PLAIN)
        trap = Trap(RAISE, at=at, number=STOPS[at % len(STOPS)], slow_ms=1000 if at % 2 else 0)
        ran = scene.run(runs, PLAIN, trap, processes=True)
        assert ran.lingered < TOO_LONG
        _stopped_cleanly(scene, runs, ran)


def _in_a_child(scene: Scene, runs: Machine) -> list[int]:
    """Returns some calls that are a child's."""
    for _ in range(10):  # on a busy machine one of the two may have made all before the other began
        scene.begin(PLAIN)
        assert scene.run(runs, PLAIN, processes=True).code == 0
        if len({call.pid for call in runs.calls}) == 3:
            break
    assert len({call.pid for call in runs.calls}) == 3
    parent = runs.calls[0].pid
    found = [n for n, call in enumerate(runs.calls, 1) if call.pid != parent]
    return found[3:-3:9]


def test_a_child_that_is_killed(scene: Scene, runs: Machine) -> None:
    for at in _in_a_child(scene, runs):
        scene.begin(PLAIN)
        ran = scene.run(runs, PLAIN, Trap(KILL, at=at), processes=True)
        assert ran.code == 4
        assert ran.json()["errors"][0]["code"] == "worker-died"
        receipts = scene.stopped(PLAIN)
        assert scene.seen(PLAIN) == ""
        assert scene.run(runs, PLAIN).json()["parts_made"] == PARTS - receipts
        scene.published(PLAIN)


def test_children_end_with_their_parent(scene: Scene, runs: Machine) -> None:
    for at in _in_a_child(scene, runs):
        _orphaned(scene, runs, Trap(KILL_PARENT, at=at))


def test_orphans_end_while_the_disk_does_not_answer(scene: Scene, runs: Machine) -> None:
    for at in _in_a_child(scene, runs)[:3]:
        assert _orphaned(scene, runs, Trap(KILL_PARENT, at=at, slow_ms=FOREVER)) < PARTS


def _orphaned(scene: Scene, runs: Machine, trap: Trap) -> int:
    scene.begin(PLAIN)
    ran = scene.run(runs, PLAIN, trap, processes=True)
    assert ran.code == -9
    assert ran.lingered < TOO_LONG
    assert ran.err == ""
    receipts = scene.stopped(PLAIN)
    assert scene.run(runs, PLAIN).json()["parts_made"] == PARTS - receipts
    scene.published(PLAIN)
    return receipts
