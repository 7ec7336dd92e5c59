"""Claims against files: every file of a DeepSpeed checkpoint taken away, cut, swapped or replaced in turn.

What comes out is right, that is equal to what DeepSpeed itself reads from the untouched checkpoint, or it is refused, and
the refusal names the place. The checkpoints are those of ``tests/golden``, written by DeepSpeed, XTuner and the Trainer.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
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
            yield Damage(
                f"all {kind} files taken away", kind, {n: d for n, d in files.items() if n not in mine}, (saved,)
            )
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


# --- what one model file states, changed claim by claim ---


def _listed(root: dict) -> dict:
    """The first group of param_shapes; stage 0 has none, or of old DeepSpeeds the list."""
    return root["param_shapes"][0]


def _rename(table: dict, old: str, new: str) -> None:
    pairs = [(new if name == old else name, value) for name, value in table.items()]
    table.clear()
    table.update(pairs)


def _reshape(root: dict) -> None:
    shapes = _listed(root)
    name = next(name for name, shape in shapes.items() if len(shape) > 1 and len(set(shape)) > 1)
    shapes[name] = torch.Size(reversed(shapes[name]))


def _grow(root: dict) -> None:
    shapes = _listed(root)
    name = next(name for name, shape in shapes.items() if len(shape) > 1)
    shapes[name] = torch.Size((shapes[name][0] + 1, *shapes[name][1:]))


def _exchange(root: dict) -> None:
    """Two parameters of one shape change their names."""
    shapes = _listed(root)
    one, two = next((a, b) for a, b in combinations(shapes, 2) if shapes[a] == shapes[b])
    _rename(shapes, one, "?")
    _rename(shapes, two, one)
    _rename(shapes, "?", two)


def _first(root: dict) -> str:
    return next(iter(_listed(root)))


def _stage(number: int) -> Callable[[dict], None]:
    return lambda root: root["ds_config"]["zero_optimization"].update(stage=number)


def _frozen(root: dict, key: str) -> dict:
    table = root[key]
    assert table, "no frozen parameters"
    return table


EDITS: dict[str, Callable[[dict], object]] = {
    "stage 0": _stage(0),
    "stage 1": _stage(1),
    "stage 2": _stage(2),
    "stage 3": _stage(3),
    "another micro-batch": lambda root: root["ds_config"].update(train_micro_batch_size_per_gpu=3),
    "more ranks": lambda root: root.update(dp_world_size=root["dp_world_size"] + 1),
    "fewer ranks": lambda root: root.update(dp_world_size=root["dp_world_size"] - 1),
    "two model-parallel ranks": lambda root: root.update(mp_world_size=2, checkpoint_parallel_dimensions=None),
    "two tensor-parallel ranks": lambda root: root.update(checkpoint_parallel_dimensions={"pp_degree": 1, "tp_degree": 2}),
    "two stages": lambda root: root.update(checkpoint_parallel_dimensions={"pp_degree": 2, "tp_degree": 1}),
    "experts": lambda root: root.update(num_experts=[4]),
    "a later step": lambda root: root.update(global_steps=root["global_steps"] + 2),
    "an earlier step": lambda root: root.update(global_steps=root["global_steps"] - 1),
    "a skipped step": lambda root: root.update(skipped_steps=1),
    "another DeepSpeed": lambda root: root.update(ds_version="0.18.1"),
    "a shape turned": _reshape,
    "a shape grown": _grow,
    "two names exchanged": _exchange,
    "a parameter less": lambda root: _listed(root).pop(_first(root)),
    "a parameter more": lambda root: _listed(root).update({"another.weight": torch.Size((3, 3))}),
    "a group less": lambda root: root["param_shapes"].pop(),
    "no param_shapes": lambda root: root.update(param_shapes=None),
    "a frozen shape grown": lambda root: root["frozen_param_shapes"].update(
        {name: torch.Size((7, *shape)) for name, shape in _frozen(root, "frozen_param_shapes").items()}
    ),
    "a frozen parameter more": lambda root: _frozen(root, "frozen_param_shapes").update(more=torch.Size((2,))),
    "no frozen fragments": lambda root: _frozen(root, "frozen_param_fragments").clear(),
    "an owner that is nowhere": lambda root: root["shared_params"].update({"tied.weight": "nowhere.weight"}),
    "an owner of another shape": lambda root: root["shared_params"].update({_first(root): list(_listed(root))[1]}),
    "a placeholder in module": lambda root: root["module"].update({_first(root): torch.empty(0)}),
    "a module weight turned": lambda root: root["module"].update(
        {name: root["module"][name].t().contiguous() for group in root["param_shapes"] for name, shape in group.items()
         if len(shape) == 2 and shape[0] != shape[1]}
    ),
    "other module weights": lambda root: root["module"].update(
        {name: root["module"][name] + 1 for group in root["param_shapes"] for name in group}
    ),
}  # fmt: skip


def edited(saved: Saved, what: str) -> Damage | None:
    """The checkpoint with one claim of rank 0's model file changed, or ``None`` where it makes no such claim."""
    files = saved.files()
    name = next(name for name in files if _kind(name) == "model")
    root = torch.load(saved.tag / name, weights_only=False)
    before = torch.load(saved.tag / name, weights_only=False)
    try:
        EDITS[what](root)
    except (KeyError, IndexError, StopIteration, TypeError, AttributeError, AssertionError, ModuleNotFoundError):
        return None
    if repr(root) == repr(before):
        return None
    folder = Path(tempfile.mkdtemp())
    torch.save(root, folder / name)  # under its own name, which the file keeps inside
    files[name] = (folder / name).read_bytes()
    shutil.rmtree(folder)
    return Damage(what, name, files, (saved,))
