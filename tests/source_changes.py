"""Changes a source file at many moments of a run: ``python -m tests.source_changes``.

A run is stopped at a call that looks at, reads or writes a file, one file of its source is changed in one of seven
ways, and the run goes on. It must refuse the source, or give the result of what the file was before; where the change
came before it first looked at the file, that of what it is now. Nothing else is ever published, no signal ends it, and
with the file put back the same command gives the right result, whatever was made meanwhile.

``tests/soak/source-changes.json`` is written after every group of 50 moments; what it holds already is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import tool
from tests.killing import HOLD, Call, Machine, Ran, Trap, machine
from tests.mutations import MUTATIONS

RESULTS = Path(__file__).parent / "soak" / "source-changes.json"
MOMENTS = 50
NOBODY = 65534

# A tile of each is more than a MiB: less is never mapped.
_SHAPES = {"model.embed_tokens.weight": (768, 1024), "model.norm.weight": (640, 1024), "lm_head.weight": (768, 1024)}
_SIDES = {
    "config.json": json.dumps({"model_type": "mine", "hidden_size": 1024, "numbers": [*range(300)]}),
    "tokenizer.json": json.dumps({"model": {"vocab": {f"word {n}": n for n in range(1000)}}}),
}
_OPTIONS = ("--dtype", "bfloat16", "--shard-size", "2MB", "--workers", "1")


@dataclass(frozen=True, order=True)
class Group:
    """What is changed, in which runs.

    Attributes
    ----------
    source, file
        The checkpoint, and which of its files.
    command
        ``convert``, or ``run`` of a plan that was written down.
    io
        How sources are read.
    kind
        The change, by its name in ``MUTATIONS``.
    """

    source: str
    file: str
    command: str
    io: str
    kind: str


class Wrong(AssertionError):
    """Something that may never be."""


def write_safetensors(folder: Path) -> None:
    """Two shards, an index and small files."""
    from benchmarks.synthetic import write_safetensors as write

    folder.mkdir()
    names = {f"model-0000{n}-of-00002.safetensors": shapes for n, shapes in enumerate(_halves(), 1)}
    for (name, shapes), dtype in zip(names.items(), ("F32", "BF16"), strict=True):  # the second is copied
        write(folder / name, shapes, dtype, fill=True)
    index = {"metadata": {}, "weight_map": {tensor: name for name, shapes in names.items() for tensor in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, text in _SIDES.items():
        (folder / name).write_text(text)


def _halves() -> Iterator[dict[str, tuple[int, ...]]]:
    items = list(_SHAPES.items())
    yield from (dict(items[:2]), dict(items[2:]))


def write_zero(folder: Path) -> None:
    """A ZeRO-2 run of two ranks."""
    from benchmarks.synthetic import write_zero as write

    write(folder, _SHAPES, stage=2, world=2, fill=True)


def write_torch(folder: Path) -> None:
    """A ``pytorch_model.bin``."""
    import torch

    folder.mkdir()
    random = np.random.default_rng(0)
    torch.save(
        {name: torch.from_numpy(random.standard_normal(shape, np.float32)) for name, shape in _SHAPES.items()},
        folder / "pytorch_model.bin",
    )


SOURCES = {"safetensors": write_safetensors, "ZeRO-2": write_zero, "torch": write_torch}
_CAST, _COPIED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_RANK = "global_step1/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"

# Source, the file that is changed, the command, and the ways of reading.
_BOTH = ("pread", "mmap")
_TRIED = (
    ("safetensors", _CAST, "convert", _BOTH),
    ("safetensors", _CAST, "run", _BOTH),
    ("ZeRO-2", _RANK, "run", _BOTH),
    ("torch", "pytorch_model.bin", "convert", _BOTH),
    ("safetensors", "tokenizer.json", "convert", ("pread",)),
    ("safetensors", "config.json", "convert", ("pread",)),
    ("safetensors", "tokenizer.json", "run", ("pread",)),
    ("safetensors", _COPIED, "convert", _BOTH),
)


def groups() -> list[Group]:
    """Returns all groups."""
    return [Group(*what, io, kind) for *what, ways in _TRIED for io, kind in product(ways, MUTATIONS)]


class Stage:
    """One source, where it is converted, and what an undisturbed run makes of it."""

    def __init__(self, root: Path, name: str, runs: Machine) -> None:
        self.root, self._runs = root, runs
        self.kept, self.source, self.place = root / "kept", root / "in", root / "place"
        SOURCES[name](self.kept)
        shutil.copytree(self.kept, self.source)
        plan = runs.run("plan", self._mapping(), "--out", root / "plan.json")
        assert plan.code == 0, plan.err
        self._user = {"user": NOBODY} if os.getuid() == 0 else {}  # root may read what has mode 000
        self._golden: dict[str, dict[str, bytes]] = {}
        self._calls: dict[tuple[str, str], list[Call]] = {}

    def _mapping(self) -> Path:
        saved = self.root / "mapping.yaml"
        ran = self._runs.run("convert", self.source, self.root / "first", *_OPTIONS, "--save-mapping", saved)
        assert ran.code == 0, ran.err
        return saved

    @property
    def out(self) -> Path:
        return self.place / "out"

    def _command(self, group: Group) -> list[object]:
        if group.command == "run":
            return ["run", self.root / "plan.json", "--out", self.out, "--io", group.io, "--workers", "1", "--json"]
        return ["convert", self.source, self.out, *_OPTIONS, "--io", group.io, "--json"]

    def _run(self, group: Group, trap: Trap | None = None, **given: Any) -> Ran:
        return self._runs.run(*self._command(group), trap=trap, **self._user, **given)

    def _begin(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        self.place.chmod(0o777)

    def restore(self, file: str) -> None:
        """Puts a file back: the same bytes and times, as a file of its own."""
        path = self.source / file
        path.unlink(missing_ok=True)
        shutil.copy2(self.kept / file, path)

    def moments(self, group: Group, count: int) -> Sequence[int]:
        """Returns calls of an undisturbed run, from 1, spread evenly over it; of maps the moment after each too."""
        key = group.command, group.io
        if key not in self._calls:
            self._begin()
            ran = self._run(group, Trap(under=str(self.root)))
            assert ran.code == 0, ran.err
            self._calls[key] = self._runs.calls
            self._golden[group.command] = _files(self.out)
        calls = self._calls[key]
        mapped = [at for at, call in enumerate(calls, 1) if call.name == "populated"]
        spread = [1 + round(n * (len(calls) - 1) / max(count - 1, 1)) for n in range(count)]
        return sorted({*mapped, *random.Random(0).sample(spread, max(count - len(mapped), 0))})

    def outcome(self, group: Group, at: int) -> str:
        """Changes the file at a call, and says what became of the run; raises ``Wrong``."""
        self._begin()
        self.restore(group.file)
        change = MUTATIONS[group.kind]
        trap = Trap(HOLD, at=at, under=str(self.root))
        ran = self._run(group, trap, held=lambda: change(self.source / group.file))
        if not self._runs.hit:
            raise Wrong("the call was not made")
        if "Traceback" in ran.err or ran.code not in (0, 1):
            raise Wrong(f"exit {ran.code}: {ran.err}")
        return self._accepted(group) if ran.code == 0 else self._refused(group, ran)

    def _accepted(self, group: Group) -> str:
        found = _files(self.out)
        if found == self._golden[group.command]:
            return "as before"
        self._begin()
        if self._run(group).code or _files(self.out) != found:
            raise Wrong("the result is neither that of the file as it was nor that of the file as it is")
        return "as it is now"

    def _refused(self, group: Group, ran: Ran) -> str:
        error = ran.json()["errors"][0]
        if self.out.exists():
            raise Wrong(f"refused, and published: {ran.err}")
        says_so = error["code"] == "source-changed" or (error["code"] == "missing-file" and group.kind == "deleted")
        if says_so and Path(group.file).name not in error["where"]:
            raise Wrong(f"another file is named: {error['where']}")
        kept = self.root / "kept-place"
        shutil.rmtree(kept, ignore_errors=True)
        self.place.rename(kept)
        if not says_so:
            self._as_if_always(group, error)
        shutil.rmtree(self.place, ignore_errors=True)
        kept.rename(self.place)
        self.restore(group.file)
        again = self._run(group)
        if again.code or _files(self.out) != self._golden[group.command]:
            raise Wrong(f"{error['code']}; with the file put back: exit {again.code}: {again.err}")
        return f"refused: {error['code']}"

    def _as_if_always(self, group: Group, error: dict[str, Any]) -> None:
        """Another error is one that the file gives whoever comes later."""
        self._begin()
        later = self._run(group)
        if later.code != 1 or later.json()["errors"][0] != error:
            raise Wrong(f"an error that the file does not explain: {error}; later: exit {later.code} {later.err}")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(stage: Stage, group: Group, count: int = MOMENTS) -> tuple[Counter[str], list[str]]:
    """Changes the file of a group at so many moments; returns the outcomes, and what may never be."""
    found: Counter[str] = Counter()
    wrong = []
    for at in stage.moments(group, count):
        try:
            found[stage.outcome(group, at)] += 1
        except AssertionError as error:
            wrong.append(f"{group} at {at}: {error}"[:600])
    stage.restore(group.file)
    return found, wrong


def main() -> None:
    """Does all groups, and writes what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=MOMENTS)
    parser.add_argument("--again", action="store_true", help="begin anew, and do not go on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    value = _begun(given.out, again=given.again)
    done = {_key(row) for row in value["rows"]}
    base = Path(tempfile.mkdtemp(prefix="shardmerge-changes-", dir="/dev/shm"))
    base.chmod(0o755)
    try:
        with machine(base, tool("gcc")) as runs:
            stages: dict[str, Stage] = {}
            for group in groups():
                if group in done:
                    continue
                if group.source not in stages:
                    (base / group.source).mkdir()
                    stages[group.source] = Stage(base / group.source, group.source, runs)
                found, wrong = changed(stages[group.source], group, given.moments)
                print(group, dict(found), *wrong, sep="\n    ", flush=True)
                value["rows"].append({**vars(group), "outcomes": dict(sorted(found.items())), "wrong": wrong})
                given.out.write_text(json.dumps(value, indent=1) + "\n")
    finally:
        shutil.rmtree(base)
    raise SystemExit(any(row["wrong"] for row in value["rows"]))


def _begun(path: Path, *, again: bool) -> dict[str, Any]:
    if path.exists() and not again:
        return dict(json.loads(path.read_text()))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "kernel": os.uname().release, "groups": len(groups()), "rows": []}


def _key(row: dict[str, Any]) -> Group:
    return Group(row["source"], row["file"], row["command"], row["io"], row["kind"])


if __name__ == "__main__":
    main()
