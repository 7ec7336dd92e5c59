"""Claims against files: every file of a DeepSpeed checkpoint taken away, cut, swapped or replaced in turn.

What comes out is right, that is equal to what DeepSpeed itself reads from the untouched checkpoint, or it is refused, and
the refusal names the place. The checkpoints are those of ``tests/golden``, written by DeepSpeed, XTuner and the Trainer.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import shardmerge as sm
from tests.conftest import GOLDEN, read_all, same_values

Files = dict[str, bytes]


@dataclass(frozen=True)
class Saved:
    """A tag directory and what DeepSpeed reads from it."""

    name: str
    tag: Path
    truth: Path
    stage: int

    def files(self) -> Files:
        return {path.name: path.read_bytes() for path in sorted(self.tag.glob("*_states.pt"))}

    def values(self) -> dict[str, np.ndarray]:
        return _values(self.truth)


@cache
def _values(truth: Path) -> dict[str, np.ndarray]:
    tensors = load_file(truth)
    return {name: (t.double() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def _saved(case: Path) -> Iterator[Saved]:
    about = json.loads((case / "case.json").read_text())
    entry = case / about["entry"] if "entry" in about else next(case.glob("checkpoint-*"))
    if not entry.is_dir():
        return
    latest = entry / "latest"
    tag = entry / latest.read_text().strip() if latest.is_file() else entry
    yield Saved(case.name, tag, case / "truth.safetensors", about["stage"])
    first = case / "truth_first_tag.safetensors"
    if first.is_file():
        other = next(item for item in entry.iterdir() if item.is_dir() and item != tag)
        yield Saved(f"{case.name}, first tag", other, first, about["stage"])


CASES = [saved for kind in ("zero/*", "xtuner/*", "hf_trainer") for path in sorted(GOLDEN.glob(f"{kind}/case.json"))
         for saved in _saved(path.parent)]  # fmt: skip


def relatives(saved: Saved) -> list[Saved]:
    """Checkpoints of the same stage with files of the same names, the likest first."""
    names = set(saved.files())
    mine = [other for other in CASES if other.tag != saved.tag and set(other.files()) == names]
    return sorted(mine, key=lambda other: -len(os.path.commonprefix([other.name, saved.name])))


@dataclass(frozen=True)
class Damage:
    """One input of the table: what was done, the files that it left, and whose truth may come out."""

    what: str
    touched: str
    files: Files
    right: tuple[Saved, ...]


def _kind(name: str) -> str:
    return "optim" if "optim" in name else "model"


def damages(saved: Saved, most_relatives: int = 100) -> Iterator[Damage]:
    """All inputs made of one checkpoint."""
    files = saved.files()
    for name, data in files.items():
        yield Damage("taken away", name, {n: d for n, d in files.items() if n != name}, (saved,))
        for what, rest in (("emptied", b""), ("cut in half", data[: len(data) // 2]), ("cut by a byte", data[:-1])):
            yield Damage(what, name, {**files, name: rest}, (saved,))
    for kind in ("model", "optim"):
        mine = [name for name in files if _kind(name) == kind]
        if mine:
            yield Damage(f"all {kind} files taken away", kind, {n: d for n, d in files.items() if n not in mine}, (saved,))
        for one, two in combinations(mine, 2):
            yield Damage("swapped", one, {**files, one: files[two], two: files[one]}, (saved,))
            yield Damage("replaced by a neighbour", one, {**files, one: files[two]}, (saved,))
    for other in relatives(saved)[:most_relatives]:
        theirs = other.files()
        for name in files:
            yield Damage(f"replaced by that of {other.name}", name, {**files, name: theirs[name]}, (saved, other))
        for kind in ("model", "optim"):
            mixed = {name: theirs[name] if _kind(name) == kind else data for name, data in files.items()}
            yield Damage(f"{kind} files of {other.name}", kind, mixed, (saved, other))


def outcome(damage: Damage, folder: Path, view: str = "fp32") -> str:
    """``right``, or the code of the refusal. Anything else fails."""
    folder.mkdir()
    for name, data in damage.files.items():
        (folder / name).write_bytes(data)
    try:
        catalog = sm.inspect(folder, view=view)
    except sm.ShardmergeError as error:
        assert str(folder) in str(error)
        return error.code
    assert not catalog.absent, "a placeholder left without its data"
    found = read_all(catalog)
    for saved in damage.right:
        truth = saved.values()
        if found.keys() == truth.keys() and all(same_values(found[name], truth[name]) for name in truth):
            return "right"
    return "WRONG"
