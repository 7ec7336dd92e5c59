"""What is said of plans that were written down, of parts, of what is left of other runs, and after publishing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from tests.following import RUN, Call, Follow, Row, argument, by_hand
from tests.hint_rows.given import CONVERT, Given, made, mapped, stored, without
from tests.test_mistakes import REST

# Several files, so that there are parts.
PARTS = "sources: {m: $gqa}\noutput: {path: out, shard_size: 20KB}\ntensors:\n" + REST
SHARE = (*RUN, "--part", "0/2")


def after(*commands: Sequence[str], then: Callable[[Call], object] = str, args: Sequence[str] = RUN) -> Given:
    """Calls that went well, something that happens, and a call."""

    def given(call: Call) -> Sequence[str]:
        mapped(PARTS)(call)
        for command in commands:
            call.args = list(command)
            assert call.attempt() == (), command
        then(call)
        return args

    return given


def at_work(call: Call) -> None:
    """A process has a file open where the parts gather; the shell that runs it is the one that is to be stopped."""
    opened = shlex.quote(str(staging(call) / "begun.json"))
    process = subprocess.Popen(["sh", "-c", f"exec 9<{opened}; echo; exec sleep 60"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    call.folder.joinpath("pid").write_text(str(process.pid))


def stop_it(call: Call) -> None:
    """Runs the command that the hint has."""
    command = call.hint.partition("stop it: ")[2].partition(";")[0]
    assert command == f"kill {(call.folder / 'pid').read_text()}"
    subprocess.run(command, shell=True, check=True)


def staging(call: Call) -> Path:
    """The directory in which parts gather."""
    (root,) = call.folder.glob("out.partial-*")
    return root


def first(command: str) -> Follow:
    """Calls the command that the hint has in these words before the same call."""

    def follow(call: Call) -> None:
        assert command in call.hint
        same = call.args
        call.args = shlex.split(call.hint[call.hint.index(command) :].replace("MAPPING", "mapping.yaml"))[1:]
        call.args = [one.replace("PLAN", "plan.json") for one in call.args]
        assert call.attempt() == ()
        call.args = same

    return follow


def rewritten(old: str, new: str) -> Callable[[Call], object]:
    """Changes the text of a plan."""

    def do(call: Call) -> None:
        path = call.folder / "plan.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return do


def failing(name: str, where: Callable[[Path], bool]) -> Callable[[Call], object]:
    """Lets a system call fail for some paths, until the hint is followed."""

    def do(call: Call) -> None:
        real = getattr(os, name)

        def broken(path: int | str | Path, *args: object, **named: object) -> object:
            place = Path(f"/proc/self/fd/{path}").resolve() if isinstance(path, int) else Path(path)
            if where(place):
                raise OSError(5, "Input/output error")
            return real(path, *args, **named)

        call.faults.enter_context(mock.patch.object(os, name, broken))

    return do


def array_task(call: Call) -> None:
    """What Slurm sets for the last task of eight."""
    (words,) = re.findall(r"--part \S+?(?=,)", call.hint)
    with mock.patch.dict(os.environ, {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8"}):
        call.args[-2:] = os.path.expandvars(words).split()


def inside(call: Call) -> None:
    """Writes to where the hint says, and removes it in the end."""
    place = call.hint.rpartition(": ")[2]
    call.faults.callback(shutil.rmtree, place)
    call.args[-1] = place


WRITTEN = ("plan", "mapping.yaml", "--out", "plan.json")

PLANS = [
    Row(
        "another mount for a mapping",
        mapped(PARTS, *RUN, "--root", "/a=/b"),
        "no-effect",
        without("--root", "/a=/b"),
        words="paths in the mapping",
    ),
    Row(
        "a plan over a file that is none",
        after(args=("plan", "mapping.yaml", "--out", "mapping.yaml")),
        "output-exists",
        lambda call: call.args.__setitem__(-1, call.hint.split()[-1]),
        words="write the plan to another file",
    ),
    Row(
        "a plan of another version",
        after(WRITTEN, then=rewritten('"schema": ', '"schema": 9'), args=("run", "plan.json", "-q")),
        "other-version",
        first("shardmerge plan"),
    ),
    Row(
        "a plan that was edited",
        after(WRITTEN, then=rewritten('"rules": [', '"rules": [ '), args=("run", "plan.json", "-q")),
        "damaged-plan",
        first("shardmerge plan"),
    ),
    Row("a share that is none", mapped(PARTS, *RUN, "--part", "8/8"), "bad-part", array_task),
]

STAGED = [
    Row(
        "an end before all is made",
        after(SHARE, args=("finish", "mapping.yaml")),
        "parts-missing",
        by_hand("run the same mapping or plan without --part", lambda call: call.args.__setitem__(0, "run")),
    ),
    Row(
        "parts of another mapping",
        after(SHARE, args=(*RUN, "--dtype", "f16")),
        "other-plan-staged",
        lambda call: call.args.append(call.hint.split()[3].rstrip(",")),
    ),
    Row(
        "parts of another mapping, to be removed",
        after(SHARE, args=(*RUN, "--dtype", "f16")),
        "other-plan-staged",
        first("shardmerge clean"),
    ),
    Row(
        "parts that somebody is at work on",
        after(SHARE, then=at_work, args=("clean", "out")),
        "staging-in-use",
        by_hand("stop it", stop_it),
    ),
    Row(
        "a part that changed",
        after(
            SHARE,
            then=lambda call: os.truncate(next(staging(call).glob("model/*.safetensors")), 100),
            args=(*RUN, "--part", "1/2"),
        ),
        "part-differs",
        by_hand("run the same mapping or plan without --part", lambda call: call.args.__delitem__(slice(-2, None))),
    ),
    Row(
        "a file among the parts",
        after(SHARE, then=lambda call: (staging(call) / "model/notes.txt").write_text("mine")),
        "part-differs",
        lambda call: call.args.append(call.hint.split()[-1]),
        words="--fresh",
    ),
]

OUTPUT = [
    Row(
        "another result at the output path",
        after(RUN, args=(*RUN, "--dtype", "f16")),
        "output-exists",
        lambda call: call.args.append(re.findall(r"--overwrite", call.hint)[0]),
    ),
    Row(
        "something else to be replaced",
        made(lambda call: stored(call.folder / "out/precious.bin", {}), *CONVERT, "--overwrite", "$gqa", "out"),
        "not-ours",
        argument("out", "out2", "choose another path"),
    ),
    Row("a mount point as output", (*CONVERT, "$gqa", "/dev/shm"), "output-is-mount", inside),
    Row(
        "a disk that does not keep the name",
        after(
            then=lambda call: failing("fsync", lambda place: place == call.folder and (place / "out").exists())(call),
            args=("run", "mapping.yaml", "-q"),
        ),
        "durability-unconfirmed",
        lambda call: (call.faults.close(), subprocess.run(call.ticked()[0].split(), check=True)),
    ),
    Row(
        "a disk that does not let go",
        after(then=failing("rmdir", lambda place: place.name == "parts")),
        "not-tidied",
        by_hand("remove that directory", lambda call: (call.faults.close(), shutil.rmtree(staging(call)))),
    ),
]

ROWS = [*PLANS, *STAGED, *OUTPUT]
