"""Several processes at one result, taking turns call by call: whoever is held up anywhere, it is the result of one run.

A schedule is a list of turns: who goes on, and for how many calls that change a file. All others stand still meanwhile,
so that a schedule is the same each time it is played.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.killing import Machine, Ran, Trap
from tests.scene import WAYS, Scene, Way, other

PLAIN, OVERWRITE, GAP = WAYS["plain"], WAYS["overwrite"], WAYS["no-exchange"]
TO_THE_END, KILLED = 1_000_000, -9


Command = Sequence[object]


def _part(scene: Scene, text: str) -> Command:
    return scene.command(PLAIN, "--part", text)


def _finish(scene: Scene, way: Way) -> Command:
    return ["finish", scene.plan(way.form), "--out", scene.out, "--workers", "1", "--json", *way.arguments]


def _clean(scene: Scene) -> Command:
    return ["clean", scene.out]


def play(
    scene: Scene, runs: Machine, way: Way, commands: Sequence[Command], turns: Sequence[tuple[int, int]],
    made: Path | None = None, **given: object,
) -> list[Ran]:  # fmt: skip
    """Plays a schedule; whatever became of it, the same command then ends with the result and nothing else."""
    scene.begin(way, made)
    played = runs.play(commands, turns, Trap(no_exchange=way.no_exchange), **given)
    for ran in played:
        assert ran.code in (0, 1, KILLED), (turns, ran.err)
        assert "Traceback" not in ran.err, turns
    seen = scene.seen(way)
    if scene.other_staging(way):
        assert runs.run(*_clean(scene)).code == 0  # as the next run says
        seen = scene.seen(way)
    if seen == "new":
        assert scene.run(runs, way).json()["parts_made"] == 0, turns
    else:
        last = scene.run(runs, way)
        assert last.code == 0, (turns, last.err)
    scene.published(way)
    return played


def all_did_well(played: Sequence[Ran]) -> bool:
    return all(ran.code == 0 for ran in played)


def _length(scene: Scene, runs: Machine, way: Way, command: Command, made: Path | None = None) -> int:
    scene.begin(way, made)
    assert runs.run(*command, trap=Trap(no_exchange=way.no_exchange)).code == 0
    return runs.count


# --- two, one of them held up at any call while the other runs from beginning to end ---


def test_two_runs(scene: Scene, runs: Machine) -> None:
    command = scene.command(PLAIN)
    for at in range(1, _length(scene, runs, PLAIN, command), 3):
        played = play(scene, runs, PLAIN, [command, command], [(0, at), (1, TO_THE_END)])
        assert all_did_well(played), (at, played)


@pytest.mark.parametrize("way", ["plain", "overwrite", "no-exchange"])
def test_two_that_finish(scene: Scene, runs: Machine, way: str) -> None:
    made = scene.keep_made(runs, WAYS[way])
    finish = _finish(scene, WAYS[way])
    for at in range(1, _length(scene, runs, WAYS[way], finish, made) + 1, 1 if way == "no-exchange" else 2):
        played = play(scene, runs, WAYS[way], [finish, finish], [(0, at), (1, TO_THE_END)], made)
        assert all_did_well(played), (at, played)


def test_one_that_finishes_and_one_that_is_late(scene: Scene, runs: Machine) -> None:
    """The late one makes a part that somebody else has made meanwhile; all others are there."""
    late = _part(scene, "0/3")
    for at in range(1, _length(scene, runs, PLAIN, late), 4):
        others = [_part(scene, "1/3"), _part(scene, "2/3"), scene.command(PLAIN)]
        turns = [(0, at), (1, TO_THE_END), (2, TO_THE_END), (3, TO_THE_END)]
        assert all_did_well(play(scene, runs, PLAIN, [late, *others], turns)), at


def test_clean_and_a_run(scene: Scene, runs: Machine) -> None:
    """A run that has a file open there is left alone. Between two files what it works on is taken from it: it fails, or
    had published before; nothing is published in part.
    """
    command = scene.command(PLAIN)
    for at in range(1, _length(scene, runs, PLAIN, command), 3):
        ran, cleaned = play(scene, runs, PLAIN, [command, _clean(scene)], [(0, at), (1, TO_THE_END)])
        assert cleaned.code == 0 or (ran.code == 0 and "[staging-in-use]" in cleaned.err)


def test_a_run_and_clean(scene: Scene, runs: Machine) -> None:
    """The one that removes is held up: it finds what the other had begun anew, or nothing."""
    made = scene.keep_made(runs, PLAIN)
    for at in range(1, _length(scene, runs, PLAIN, _clean(scene), made) + 1):
        played = play(scene, runs, PLAIN, [_clean(scene), scene.command(PLAIN)], [(0, at), (1, TO_THE_END)], made)
        assert all_did_well(played), (at, played)


def test_a_fresh_run_and_one_that_publishes(scene: Scene, runs: Machine) -> None:
    made = scene.keep_made(runs, PLAIN)
    finish, fresh = _finish(scene, PLAIN), scene.command(PLAIN, "--fresh")
    for at in range(1, _length(scene, runs, PLAIN, finish, made) + 1, 3):
        play(scene, runs, PLAIN, [finish, fresh], [(0, at), (1, at * 2), (0, TO_THE_END)], made)


# --- many ---


def _shuffled(rng: random.Random, count: int, longest: int) -> list[tuple[int, int]]:
    """Turns of random length; now and then somebody is killed."""
    turns = []
    for _ in range(rng.randrange(3 * count, 12 * count)):
        who = rng.randrange(count)
        turns.append((who, KILLED if rng.random() < 0.02 else rng.randrange(1, longest)))
    return turns


@pytest.mark.parametrize("count", [1, 3, 16])
def test_shares_in_any_order(scene: Scene, runs: Machine, count: int) -> None:
    """Each makes its share, and whoever sees the last part publishes; two may be at the same share."""
    rng = random.Random(count)
    for _ in range({16: 3}.get(count, 8)):
        shares = [*range(count), rng.randrange(count)]
        rng.shuffle(shares)
        commands = [_part(scene, f"{share}/{count}") for share in shares]
        turns = _shuffled(rng, len(commands), 40)
        played = play(scene, runs, PLAIN, commands, turns)
        assert all(ran.code == 0 or -ran.code == 9 for ran in played), (turns, played)
        if all_did_well(played):
            assert any(ran.json()["published"] for ran in played)


def _crowd(scene: Scene, rng: random.Random) -> tuple[Way, list[Command]]:
    """Draws a way to publish, and commands that may meet there, of another plan too where one replaces the other."""
    way = rng.choice([PLAIN, OVERWRITE, GAP])
    kinds = [scene.command(way), *(scene.command(way, "--part", text) for text in ("any", "1/2")), _finish(scene, way)]
    if way is PLAIN:
        kinds += [_clean(scene), scene.command(way, "--fresh")]
    else:
        kinds += [_clean(scene), scene.command(replace(way, form=other(way.form)))]
    return way, [rng.choice(kinds) for _ in range(rng.randrange(2, 9))]


def anybody_at_anything(scene: Scene, runs: Machine, seed: int) -> list[Ran]:
    """Plays a random schedule of commands that are random too."""
    rng = random.Random(seed)
    way, commands = _crowd(scene, rng)
    # Who is killed is waited for, so not for a minute each time.
    return play(scene, runs, way, commands, _shuffled(rng, len(commands), 60), gone=1.0)


def all_at_a_time(scene: Scene, runs: Machine, seed: int) -> list[Ran]:
    """Lets random commands run as the system has it: they begin within a second, some are stopped, or killed."""
    rng = random.Random(seed)
    way, commands = _crowd(scene, rng)
    moments = []
    for who in range(len(commands)):
        begin = rng.choice([0.0, rng.random()])
        moments.append((begin, who, signal.SIGCONT))
        if rng.random() < 0.3:
            stop = begin + rng.random() / 2
            moments += [(stop, who, signal.SIGSTOP), (stop + rng.random() * 2, who, signal.SIGCONT)]
        if rng.random() < 0.3:
            moments.append((begin + rng.random(), who, signal.SIGKILL))
    return play(scene, runs, way, commands, (), moments=sorted(moments), gone=1.0)


@pytest.mark.parametrize("seed", range(30))
def test_anybody_at_anything(scene: Scene, runs: Machine, seed: int) -> None:
    anybody_at_anything(scene, runs, seed)


@pytest.mark.parametrize("seed", range(2))
def test_all_at_a_time(scene: Scene, runs: Machine, seed: int) -> None:
    all_at_a_time(scene, runs, seed)
