"""Small conversions, to be stopped and cut off everywhere.

The first has three files of weights, one of them in a folder, an index, and side files that are copied and made; the
others are of other formats. What is seen after each accident is compared with what an undisturbed run made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors.numpy import save_file

from tests.conftest import GOLDEN
from tests.conftest import shardmerge as command_line
from tests.killing import KILL, Call, Machine, Ran, Trap

PARTS = 3
INDEX, RECEIPT = "model.safetensors.index.json", "shardmerge.json"

_MAPPING = """\
shardmerge: 1
sources: {trained: iter_2.pth, llm: base_llm, vision: base_clip}
use: xtuner/llava-to-xtuner
output: {path: out, shard_size: 12KB}
"""

# What `convert` converts, and at how many bytes its files of weights end.
_CONVERTED = {
    "zero": (GOLDEN / "zero" / "llama_z3_w2_bf16" / "ckpt", "4KB"),
    "model": (GOLDEN / "xtuner" / "base_llm", "12KB"),
    "dcp": (GOLDEN / "dcp" / "placements_2x2_fp32" / "ckpt", "400B"),
}

# Bytes of every file by its path, None for a folder.
Tree: TypeAlias = dict[str, "bytes | None"]


def tree(folder: Path) -> Tree:
    """Returns all that is in a folder."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")
    }


@dataclass(frozen=True)
class Way:
    """A way to publish.

    Attributes
    ----------
    form
        Of the weights.
    before
        What the output path holds: ``""``, ``old`` (the result in the other format), ``empty`` (a directory of another
        owner, with a mode of its own).
    no_exchange
        Whether directories cannot be exchanged.
    source
        What is converted: ``llava``, ``blocks`` (tensors that can be cloned), or a key of ``_CONVERTED``.
    steps
        The commands, one after the other: a verb and options. ``map`` is ``run`` of the mapping, not of a plan.
    made
        Whether all parts are made before, so that only publishing is left.
    processes
        Whether it is two processes that make parts.
    """

    form: str = "safetensors"
    before: str = ""
    no_exchange: int = 0
    source: str = "llava"
    steps: tuple[tuple[str, ...], ...] = (("run",),)
    made: bool = False
    processes: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--overwrite",) if self.before == "old" else ()

    @property
    def unsynced(self) -> bool:
        return any("--no-sync" in step for step in self.steps)

    @property
    def result(self) -> tuple[str, str]:
        """What tells its result from others."""
        return self.source, self.form


WAYS = {
    "plain": Way(),
    "bin": Way(form="bin"),
    "overwrite": Way(before="old"),
    "no-exchange": Way(before="old", no_exchange=38),  # ENOSYS
    "empty": Way(before="empty"),
}
_CONVERT = (("convert",),)
# For runs that take longer than the test suite may.
MORE_WAYS = {
    "mapping": Way(steps=(("map",),)),
    "processes": Way(processes=True),
    "shares": Way(steps=(("run", "--part", "0/2"), ("run", "--part", "1/2"))),
    "finish": Way(steps=(("finish",),), made=True),
    "unsynced": Way(steps=(("run", "--part", "0/2", "--no-sync"), ("run",))),
    "zero": Way(source="zero", steps=_CONVERT),
    "zero to bin": Way(form="bin", source="zero", steps=_CONVERT, before="old"),
    "to dcp": Way(form="dcp", source="model", steps=_CONVERT),
    "to dcp, overwrite": Way(form="dcp", source="model", steps=_CONVERT, before="old"),
    "from dcp": Way(source="dcp", steps=_CONVERT),
    "blocks": Way(source="blocks", steps=_CONVERT),
}
ALL_WAYS = {**WAYS, **MORE_WAYS}
EMPTY_MODE, EMPTY_OWNER = 0o2750, 4321


@dataclass
class Scene:
    """Where it happens.

    Attributes
    ----------
    root
        A folder of its own.
    """

    root: Path
    goldens: dict[tuple[str, str], Tree] = field(default_factory=dict)
    _inputs: Tree = field(default_factory=dict)
    _stamps: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def set(cls, root: Path, machine: Machine, ways: Iterable[Way] = WAYS.values()) -> Scene:
        """Copies the sources, writes the plans, and makes each result once, undisturbed.

        The command line, in a process of its own, makes the first one too.
        """
        scene = cls(root)
        results = {one for way in ways for one in (way.result, (way.source, other(way.form)))}
        _place_inputs(scene.inputs, {source for source, _ in results})
        for source, form in sorted(results | {Way().result}):
            scene._make_golden(machine, Way(form, source=source))
        command_line("run", scene.plan(), "--out", root / "command", "-q")
        assert tree(root / "command") == scene.golden(Way())
        assert len(_weights(scene.golden(Way()))) == PARTS
        scene._inputs = tree(scene.inputs)
        scene._stamps = scene._looked_at()
        return scene

    def _make_golden(self, machine: Machine, way: Way) -> None:
        steps: tuple[tuple[str, ...], ...] = (("run",),) if way.source == "llava" else _CONVERT
        if way.source == "llava":
            mapping = self.inputs / "mapping.yaml"
            assert machine.run("plan", mapping, "--format", way.form, "--out", self.plan(way.form)).code == 0
        (ran,) = self.steps(machine, replace(way, steps=steps))
        assert ran.code == 0, ran.err
        self.goldens[way.result] = tree(self.out)
        self.place.mkdir(exist_ok=True)
        self.out.rename(self.kept(way))

    def golden(self, way: Way) -> Tree:
        """What a run has to give."""
        return self.goldens[way.result]

    def old(self, way: Way) -> Tree:
        """What the output path holds before."""
        return self.goldens[way.source, other(way.form)]

    def parts(self, way: Way) -> int:
        """How many files of weights there are."""
        return len(_weights(self.golden(way)))

    def kept(self, way: Way) -> Path:
        """Where the undisturbed result is."""
        return self.root / f"golden-{way.source}-{way.form}"

    @property
    def inputs(self) -> Path:
        return self.root / "in"

    @property
    def place(self) -> Path:
        """The folder that holds the output path; a run makes it."""
        return self.root / "place"

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def staging(self) -> Path | None:
        """The staging directory, if there is one in use."""
        found = [path for path in self.place.glob("out.partial-*") if "partial-gone" not in path.name]
        assert len(found) < 2
        return found[0] if found else None

    def other_staging(self, way: Way) -> bool:
        """Tells whether unfinished files of another plan are there."""
        own = json.loads(self.plan(way.form).read_text())["plan"][:16]
        return any(own not in path.name for path in self.place.glob("out.partial-*"))

    def plan(self, form: str = "safetensors") -> Path:
        return self.inputs / f"{form}.json"

    def command(self, way: Way, *more: object, workers: int = 1, step: tuple[str, ...] | None = None) -> list[object]:
        """Returns the command line of a step, without one of the first."""
        verb, *options = step or way.steps[0]
        place, how = ["--out", self.out], ["--workers", workers, *options, *way.arguments, *more, "--json"]
        if verb == "convert":
            size = _CONVERTED[way.source][1] if way.source in _CONVERTED else "200KB"
            return ["convert", self.inputs / way.source, self.out, "--format", way.form, "--shard-size", size, *how]
        if verb == "map":
            return ["run", self.inputs / "mapping.yaml", "--format", way.form, *place, *how]
        return [verb, self.plan(way.form), *place, *how]

    def begin(self, way: Way, made: Path | None = None) -> None:
        """Puts the place as it is before a run, or with all that a run had made before it published."""
        if self.place.exists():
            shutil.rmtree(self.place)
        if made is not None:
            shutil.copytree(made, self.place, symlinks=True)
        if way.before:
            self.place.mkdir(exist_ok=True)
        if way.before == "old":
            shutil.copytree(self.kept(replace(way, form=other(way.form))), self.out)
        if way.before == "empty":
            self.out.mkdir()
            os.chown(self.out, EMPTY_OWNER, EMPTY_OWNER)
            self.out.chmod(EMPTY_MODE)

    def run(self, machine: Machine, way: Way, trap: Trap | None = None, *more: object, **given: object) -> Ran:
        """Runs the commands under a trap, told whether directories can be exchanged; returns how the last one ended."""
        return self.steps(machine, way, trap, *more, **given)[-1]

    def steps(self, machine: Machine, way: Way, trap: Trap | None = None, *more: object, **given: object) -> list[Ran]:
        """Runs the commands until one does not do well; their calls are counted as those of one."""
        trap = replace(trap or Trap(), no_exchange=way.no_exchange)
        given = {"processes": way.processes, **given}
        calls: list[Call] = []
        found: list[Ran] = []
        for step in way.steps:
            command = self.command(way, *more, workers=2 if given["processes"] else 1, step=step)
            found.append(machine.run(*command, trap=trap, **given))
            trap = trap.after(machine.count)
            calls += machine.calls
            if machine.hit or found[-1].code:
                break
        machine.calls = calls
        return found

    def go_on(self, machine: Machine, way: Way, **given: object) -> int:
        """Runs the same commands again, to their end; returns how many parts that took."""
        ran = self.steps(machine, way, **given)
        assert ran[-1].code == 0, ran[-1].err
        answers = [one.json() for one in ran]
        return sum(answer.get("parts_made", answer.get("made")) for answer in answers)

    def keep_made(self, machine: Machine, way: Way) -> Path:
        """Keeps what a run has made just before it publishes, to begin from it."""
        kept, making = self.root / f"made-{way.source}-{way.form}", Way(way.form, source=way.source)
        if not kept.exists():
            self.begin(making)
            self.run(machine, making)
            at = claim(machine.calls)
            self.begin(making)
            assert self.run(machine, making, Trap(KILL, at=at)).code == -9
            self.place.rename(kept)
        return kept

    # --- what is seen ---

    def seen(self, way: Way) -> str:
        """Returns what is at the output path: ``new``, ``old``, ``empty`` or ``""``; nothing else may ever be there."""
        self.unharmed()
        if not os.path.lexists(self.out):
            return ""
        found = tree(self.out)
        if not found:
            assert way.before == "empty"
            return "empty"
        if found == self.golden(way):
            return "new"
        assert way.before == "old"
        assert found == self.old(way)
        return "old"

    def stopped(self, way: Way) -> int:
        """Checks what a run that was stopped anywhere left; returns how many parts have receipts."""
        seen = self.seen(way)
        staging = self.staging
        if seen == "" and way.before:
            self.in_the_gap(way)
        if seen == "new":
            return self.parts(way)
        if staging is None:
            return 0
        receipts = [path for path in staging.glob("parts/?????.json") if path.read_bytes()]
        for last in staging.rglob("*"):
            if last.name == RECEIPT or last.name.endswith(".index.json"):
                self._complete(last, way)
        return len(receipts)

    def _complete(self, last: Path, way: Way) -> None:
        """Checks that an index, or a receipt, came after all that it stands for."""
        if way.before == "old" and last.read_bytes() == self.old(way).get(last.name):
            return  # what the output path held before
        found, later = tree(last.parent), {last.name, RECEIPT}
        assert found.keys() | later == self.golden(way).keys() | later, last

    def in_the_gap(self, way: Way) -> None:
        """Where directories cannot be exchanged there is a moment in which both are in the staging directory, whole."""
        assert way.no_exchange
        assert self.staging is not None
        (old,), (ready,) = self.staging.glob("old-*"), self.staging.glob("ready-*")
        assert (tree(old), tree(ready)) == (self.old(way), self.golden(way))

    def published(self, way: Way) -> None:
        """Checks that the result is there, and nothing else."""
        assert self.seen(way) == "new"
        assert [path.name for path in self.place.iterdir()] == ["out"]
        assert sorted(path.name for path in self.root.iterdir() if path.name.startswith("place")) == ["place"]
        if way.before == "empty":
            status = self.out.stat()
            assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (EMPTY_MODE, EMPTY_OWNER, EMPTY_OWNER)

    def unharmed(self) -> None:
        """Checks that no source was touched."""
        assert self._looked_at() == self._stamps
        if not self._stamps:
            raise AssertionError("there are no sources")

    def untouched(self) -> None:
        """Checks every byte of the sources."""
        assert tree(self.inputs) == self._inputs

    def _looked_at(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for path in sorted(self.inputs.rglob("*")):
            status = path.stat()
            found[str(path)] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode
        return found


def other(form: str) -> str:
    return "bin" if form == "safetensors" else "safetensors"


def _weights(found: Tree) -> list[str]:
    return [name for name in found if name.endswith((".safetensors", ".bin", ".distcp"))]


def _place_inputs(folder: Path, sources: Collection[str]) -> None:
    folder.mkdir(parents=True)
    shutil.copy2(GOLDEN / "xtuner" / "single_frozen" / "iter_2.pth", folder)
    for name in ("base_llm", "base_clip"):
        shutil.copytree(GOLDEN / "xtuner" / name, folder / name)
    (folder / "mapping.yaml").write_text(_MAPPING)
    for name in _CONVERTED.keys() & sources:
        shutil.copytree(_CONVERTED[name][0], folder / name)
    if "blocks" in sources:
        (folder / "blocks").mkdir()
        rng = np.random.default_rng(0)
        blocks = {f"layers.{n}.weight": rng.standard_normal((256, 128), dtype=np.float32) for n in range(3)}
        save_file(blocks, folder / "blocks" / "model.safetensors")


def claim(calls: list[Call]) -> int:
    """Returns the number of the call, from 1, by which a run begins to publish."""
    return next(n for n, call in enumerate(calls, 1) if call.name == "rename" and "/ready-" in call.b)
