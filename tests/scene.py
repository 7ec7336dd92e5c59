"""One small conversion, to be stopped and cut off everywhere.

It has three files of weights, one of them in a folder, an index, and side files that are copied and made. What is seen
after each accident is compared with what an undisturbed run made.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from tests.conftest import GOLDEN
from tests.conftest import shardmerge as command_line
from tests.killing import Call, Machine, Ran, Trap

PARTS = 3
INDEX, RECEIPT = "model.safetensors.index.json", "shardmerge.json"

_MAPPING = """\
shardmerge: 1
sources: {trained: iter_2.pth, llm: base_llm, vision: base_clip}
use: xtuner/llava-to-xtuner
output: {path: out, shard_size: 12KB}
"""

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
    """

    form: str = "safetensors"
    before: str = ""
    no_exchange: int = 0

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--overwrite",) if self.before == "old" else ()


WAYS = {
    "plain": Way(),
    "bin": Way(form="bin"),
    "overwrite": Way(before="old"),
    "no-exchange": Way(before="old", no_exchange=38),  # ENOSYS
    "empty": Way(before="empty"),
}
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
    goldens: dict[str, Tree] = field(default_factory=dict)
    _inputs: Tree = field(default_factory=dict)
    _stamps: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def set(cls, root: Path, machine: Machine) -> Scene:
        """Copies the sources, writes the plans, and has the command line make each result once, undisturbed."""
        scene = cls(root)
        scene.inputs.mkdir(parents=True)
        shutil.copy2(GOLDEN / "xtuner" / "single_frozen" / "iter_2.pth", scene.inputs)
        for name in ("base_llm", "base_clip"):
            shutil.copytree(GOLDEN / "xtuner" / name, scene.inputs / name)
        (scene.inputs / "mapping.yaml").write_text(_MAPPING)
        for form in ("safetensors", "bin"):
            mapping = scene.inputs / "mapping.yaml"
            golden = root / f"golden-{form}"
            assert machine.run("plan", mapping, "--format", form, "--out", scene.plan(form)).code == 0
            assert machine.run("run", scene.plan(form), "--out", golden, "--workers", "1", "-q").code == 0
            scene.goldens[form] = tree(golden)
        command_line("run", scene.plan(), "--out", root / "command", "-q")
        assert tree(root / "command") == scene.goldens["safetensors"]
        assert sum(name.endswith(".safetensors") for name in scene.goldens["safetensors"]) == PARTS
        scene._inputs = tree(scene.inputs)
        scene._stamps = scene._looked_at()
        return scene

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

    def plan(self, form: str = "safetensors") -> Path:
        return self.inputs / f"{form}.json"

    def command(self, way: Way, *more: object, workers: int = 1) -> list[object]:
        place = "--out", self.out, "--workers", workers
        return ["run", self.plan(way.form), *place, *way.arguments, *more, "--json"]

    def begin(self, way: Way, made: Path | None = None) -> None:
        """Puts the place as it is before a run, or with all that a run had made before it published."""
        if self.place.exists():
            shutil.rmtree(self.place)
        if made is not None:
            shutil.copytree(made, self.place, symlinks=True)
        if way.before:
            self.place.mkdir(exist_ok=True)
        if way.before == "old":
            shutil.copytree(self.root / f"golden-{other(way.form)}", self.out)
        if way.before == "empty":
            self.out.mkdir()
            os.chown(self.out, EMPTY_OWNER, EMPTY_OWNER)
            self.out.chmod(EMPTY_MODE)

    def run(self, machine: Machine, way: Way, trap: Trap | None = None, *more: object, **given: object) -> Ran:
        """Runs the command, under a trap that says whether directories can be exchanged."""
        command = self.command(way, *more, workers=2 if given.get("processes") else 1)
        return machine.run(*command, trap=replace(trap or Trap(), no_exchange=way.no_exchange), **given)

    def keep_made(self, machine: Machine, way: Way) -> Path:
        """Keeps what a run has made just before it publishes, to begin from it."""
        kept = self.root / f"made-{way.form}"
        if not kept.exists():
            self.begin(Way(way.form))
            self.run(machine, Way(way.form))
            at = claim(machine.calls)
            self.begin(Way(way.form))
            assert self.run(machine, Way(way.form), Trap(1, at=at)).code == -9
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
        if found == self.goldens[way.form]:
            return "new"
        assert way.before == "old"
        assert found == self.goldens[other(way.form)]
        return "old"

    def stopped(self, way: Way) -> int:
        """Checks what a run that was stopped anywhere left; returns how many parts have receipts."""
        seen = self.seen(way)
        staging = self.staging
        if seen == "" and way.before:
            self.in_the_gap(way)
        if seen == "new":
            return PARTS
        if staging is None:
            return 0
        receipts = [path for path in staging.glob("parts/?????.json") if path.read_bytes()]
        for last in (INDEX, RECEIPT):
            for path in staging.rglob(last):
                self._complete(path, way)
        return len(receipts)

    def _complete(self, last: Path, way: Way) -> None:
        """Checks that an index, or a receipt, came after all that it stands for."""
        if way.before == "old" and last.read_bytes() == self.goldens[other(way.form)].get(last.name):
            return  # what the output path held before
        found, later = tree(last.parent), {INDEX, RECEIPT} if last.name == INDEX else {RECEIPT}
        assert found.keys() | later == self.goldens[way.form].keys() | later, last

    def in_the_gap(self, way: Way) -> None:
        """Where directories cannot be exchanged there is a moment in which both are in the staging directory, whole."""
        assert way.no_exchange
        assert self.staging is not None
        (old,), (ready,) = self.staging.glob("old-*"), self.staging.glob("ready-*")
        assert (tree(old), tree(ready)) == (self.goldens[other(way.form)], self.goldens[way.form])

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


def claim(calls: list[Call]) -> int:
    """Returns the number of the call, from 1, by which a run begins to publish."""
    return next(n for n, call in enumerate(calls, 1) if call.name == "rename" and "/ready-" in call.b)
