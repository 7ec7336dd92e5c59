"""Where the model is in a distributed checkpoint: which of the dicts that were saved, and what lies beside it.

``planner_data`` keeps the path of every name, so a key with dots in it stays one key. Roots are those that trainers use
(torch 2.13, Accelerate 1.15, Lightning 2.6, torchtitan, torchtune, OLMo-core).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, UsageError
from shardmerge.sources.dcp_metadata import DcpMetadata
from shardmerge.sources.not_read import MOMENTS, not_a_model
from shardmerge.sources.state_dict import ROOTS, root_hint

Path_: TypeAlias = "tuple[object, ...]"

# State of a run, by the first part of its name or the last: moments are named after their parameter.
# A module may be called `optimal_transport`: only whole words count.
_STATE_FIRST = re.compile(
    r"(?:(?:optim|optimizers?|dataloaders?|rng)(?:_states?|_state_dict)?(?:_\d+)?|chained_\d+|lr_schedulers?|schedulers?"
    r"|train_state|loss_scaler|grad_scaler)\."
)
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Chosen:
    """The model of a checkpoint.

    Attributes
    ----------
    title
        Its root as a dotted path, or ``top level``.
    names
        Flat name by the name below the root.
    notes, warnings
        What lies beside it.
    """

    title: str
    names: Mapping[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def is_state(name: str) -> bool:
    """Tells by its flat name whether a tensor is state of a run: an optimizer's moments, a scheduler, a data loader."""
    return _STATE_FIRST.match(name) is not None or name.rpartition(".")[2] in MOMENTS


def choose_root(folder: Path, read: Sequence[DcpMetadata], names: Sequence[str], root: str) -> Chosen:
    """Returns the model: what is below ``root``, or below the one root that trainers use, or all that there is.

    Raises
    ------
    UsageError
        ``unknown-root``.
    CheckpointError
        ``several-roots``: several models and nothing says which. ``duplicate-name``. ``not-a-model``: an optimizer's
        state alone. ``no-tensors``: nothing at all.
    """
    dropped = {name for one in read for name in one.table.dropped}
    if not names:
        raise _nothing(folder, dropped)
    known = {name: path for one in read for name, path in (one.paths or {}).items()}
    paths = {name: known.get(name, (name,)) for name in names}
    groups = Counter(path[:-1] for path in paths.values())
    key = _asked_for(folder, paths, root) if root else _usual(folder, groups)
    found = _below(folder, paths, key)
    notes = (f"{len(dropped)} tensors of the optimizer and of other state are left out",) if dropped else ()
    used = set(found.values())
    beside = Counter(path[:-1] for name, path in paths.items() if name not in used)
    return Chosen(_title(key), found, notes, _beside(key, beside))


def _below(folder: Path, paths: Mapping[str, Path_], key: Path_) -> dict[str, str]:
    """Returns all names below a root, those of dicts in it too; of the top level what is in no dict."""
    found: dict[str, str] = {}
    for name, path in paths.items():
        if path[: len(key)] != key or (not key and len(path) > 1):
            continue
        short = _title(path[len(key) :])
        if short in found:
            raise CheckpointError("duplicate-name", "two tensors have the same name", where=f"{folder}, {short[:200]}")
        found[short] = name
    return found


def _usual(folder: Path, groups: Mapping[Path_, int]) -> Path_:
    """The only root, the most telling one, or the top level."""
    telling = [(root,) for root in ROOTS if (root,) in groups]
    nested = [group for root in ROOTS for group in groups if group and group[-1] == root]
    rest = [()] if () in groups else []
    candidates = [*groups] if len(groups) == 1 else telling or nested or rest
    if candidates:
        return candidates[0]
    roots = [_title(group) for group in groups]
    raise CheckpointError(
        "several-roots",
        "the checkpoint holds several state dicts, and none is marked as the model",
        where=str(folder),
        found=", ".join(f"{_title(group)} ({count} tensors)" for group, count in list(groups.items())[:_NAMED]),
        hint=f"choose one: --root {roots[0]}, in a mapping `root: {roots[0]}`",
    )


def _asked_for(folder: Path, paths: Mapping[str, Path_], root: str) -> Path_:
    ends = (path[:end] for path in paths.values() for end in range(1, len(path)))
    found = next((key for key in ends if _title(key) == root), None)
    if found is not None:
        return found
    roots = [*dict.fromkeys(_title(path[:-1]) for path in paths.values() if len(path) > 1)]
    raise UsageError(
        "unknown-root",
        f"the checkpoint has no {root!r}",
        where=str(folder),
        found=", ".join(roots[:_NAMED]) or "no dicts inside",
        hint=root_hint(roots, root) or "leave `root` out",
    )


def _title(path: Path_) -> str:
    return ".".join(map(str, path)) or "top level"


def _beside(key: Path_, beside: Mapping[Path_, int]) -> tuple[str, ...]:
    if not beside:
        return ()
    others = ", ".join(f"{_title(group)} ({count})" for group, count in list(beside.items())[:_NAMED])
    return (
        f"{sum(beside.values())} tensors beside {_title(key)} are not part of it: {others}; --root chooses another",
    )


def _nothing(folder: Path, dropped: set[str]) -> CheckpointError:
    if dropped:
        return not_a_model("an optimizer's state", str(folder), ", ".join(sorted(dropped)[:_NAMED]))
    return CheckpointError("no-tensors", "the .metadata names no tensors", where=str(folder))
