"""The named tensors in what a torch file holds: where the state dict is, and what of it is no tensor that is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from shardmerge.errors import CheckpointError, UsageError
from shardmerge.sources.device_mesh import Meshes
from shardmerge.sources.flat_parameters import check_named
from shardmerge.sources.local_tensor import LocalTensor
from shardmerge.sources.pickle_values import Opaque, PickleValue, TensorRef
from shardmerge.sources.sharded import local_tensor

# Where training frameworks put the state dict, most telling first. Optimizer states are never searched.
ROOTS = ("state_dict", "module", "model_state_dict", "model", "params", "weights", "net")

# A small file can hold a value that is endless once written out (a dict that holds itself, or one twice, and so on).
# So names are charged to what the file holds of them, a dict that is held twice being held once.
_MOST_LEAVES = 2_000_000
_FREE_LEAVES, _LEAVES_AN_ITEM = 10_000, 4
_FREE_LETTERS, _LETTERS_AN_ITEM = 1 << 20, 256
# Tied weights and layers that repeat have a few names, a layer at most.
_MOST_NAMES = 4096
_LONGEST_NAME = 4096

# Keys looked at on each level for a hint.
_MOST_ROOTS = 20


@dataclass(frozen=True, slots=True)
class StateDict:
    """The named tensors of a file.

    Attributes
    ----------
    root_key
        Dotted path of the dict they were found in; empty for the top level.
    tensors
        By name; names of nested dicts are joined with dots.
    skipped
        Names of what is not a tensor.
    """

    root_key: str
    tensors: dict[str, TensorRef]
    skipped: tuple[str, ...]


def state_dict(root: PickleValue, *, key: str = "") -> StateDict:
    """Finds the named tensors in what a file holds.

    Parameters
    ----------
    root
        ``TorchFile.root``.
    key
        Dotted path of the dict that is meant, e.g. ``model.ema``. Empty: the first of the usual places that
        has tensors, else the top level.

    Raises
    ------
    UsageError
        ``unknown-root``: no such key.
    CheckpointError
        ``no-tensors``; ``unsupported-tensor``: a quantized, sparse, meta, nested or conjugate tensor;
        ``one-rank``: a part of a sharded tensor; ``flat-parameters``; ``duplicate-name``; ``hostile-pickle``: a value
        that is endless when written out.
    """
    root_key, holder = find_state(root, key)
    return _collect(holder, root_key)


def find_state(root: PickleValue, key: str = "") -> tuple[str, PickleValue]:
    """Returns where in a file the named tensors are, and what holds them; raises as ``state_dict``."""
    if key:
        return key, _descend(root, key)
    if isinstance(root, dict):
        for name in ROOTS:
            if isinstance(root.get(name), dict) and any(is_tensor(leaf) for _, leaf in named_leaves(root[name])):
                return name, root[name]
        if any(is_tensor(value) for value in root.values()):
            return "", _without_optimizer(root)
    raise no_tensors(root, "")


def other_states(root: PickleValue, root_key: str) -> list[str]:
    """Returns the dotted names of further dicts with tensors beside the one that was found: an average, a teacher."""
    if not root_key:
        return []
    found = (name for name in islice(_roots(root), _MOST_ROOTS) if not f"{name}.".startswith(f"{root_key}."))
    return [name for name in found if not any(part.startswith("optim") for part in name.split("."))]


def _without_optimizer(root: dict[object, PickleValue]) -> dict[object, PickleValue]:
    return {name: value for name, value in root.items() if not str(name).startswith("optimizer")}


def _descend(root: PickleValue, key: str) -> PickleValue:
    """Keys may hold dots themselves, so the longest one that fits wins."""
    value, parts = root, key.split(".")
    while parts:
        names = value if isinstance(value, dict) else {}
        end = next((end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in names), 0)
        if not end:
            raise UsageError("unknown-root", f"the file has no {key!r}", found=_keys(value), hint=_hint(root, key))
        value, parts = names[".".join(parts[:end])], parts[end:]
    return value


def _collect(holder: PickleValue, root_key: str) -> StateDict:
    tensors: dict[str, TensorRef] = {}
    skipped = []
    meshes = Meshes()
    named: Counter[int] = Counter()
    for name, leaf in named_leaves(holder):
        check_named(name, "")
        ref = leaf if isinstance(leaf, TensorRef) else _other_tensor(leaf, meshes, name)
        if ref is None:
            skipped.append(name)
            continue
        if name in tensors:
            raise CheckpointError("duplicate-name", "two tensors have the same name", where=name)
        tensors[name] = ref
        named[id(ref)] += 1
        if named[id(ref)] > _MOST_NAMES:
            raise _endless(name)
    if not tensors:
        raise no_tensors(holder, root_key)
    return StateDict(root_key, tensors, tuple(skipped))


def _other_tensor(leaf: PickleValue, meshes: Meshes, name: str) -> TensorRef | None:
    """Returns the whole of a sharded tensor, None for what is no tensor; raises for one of a kind that is not read."""
    local = local_tensor(leaf, meshes, name)
    if local is not None:
        return _whole(local, name)
    if is_tensor(leaf):
        raise unsupported_tensor(name, leaf)
    return None


def _whole(local: LocalTensor, name: str) -> TensorRef:
    """Returns the elements of a sharded tensor of which one file has all: of a run of one rank, or replicated."""
    if len(local.parts) == 1 and local.parts[0][1].shape == local.shape:
        return local.parts[0][1]
    raise CheckpointError(
        "one-rank",
        "the file holds the part of one rank, and its name does not tell which files hold the other parts",
        where=name,
        found=" and ".join(str(list(ref.shape)) for _, ref in local.parts[:2]) or "nothing of it",
        expected=f"the whole tensor, {list(local.shape)}",
        hint="bring the files of all ranks into one directory, named model_world_size_W_rank_R.pt (W ranks, R from 0"
        " on), and pass the directory",
    )


class _Budget:
    """How many names, and letters of names, a value may have when it is written out."""

    __slots__ = ("_leaves", "_letters")

    def __init__(self, value: PickleValue) -> None:
        items = _items_held(value)
        self._leaves = min(_MOST_LEAVES, _FREE_LEAVES + _LEAVES_AN_ITEM * items)
        self._letters = _FREE_LETTERS + _LETTERS_AN_ITEM * items

    def charge(self, path: str) -> None:
        """Takes off a name."""
        self._leaves -= 1
        self._letters -= len(path)
        if self._leaves < 1 or self._letters < 0 or len(path) > _LONGEST_NAME:
            raise _endless(path[:80])


def _items_held(value: PickleValue) -> int:
    """Returns how many items the dicts inside have, each dict counted once."""
    seen: dict[int, int] = {}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict) and id(one) not in seen:
            seen[id(one)] = len(one)
            waiting.extend(item for item in one.values() if isinstance(item, dict))
    return sum(seen.values())


def named_leaves(
    value: PickleValue, prefix: str = "", above: tuple[int, ...] = (), budget: _Budget | None = None
) -> Iterator[tuple[str, PickleValue]]:
    """Yields the leaves of nested dicts, with dotted names. Other containers are leaves."""
    budget = budget or _Budget(value)
    if not isinstance(value, dict):
        return
    if id(value) in above:  # how deep they nest is bounded where the pickle is read
        raise _endless(prefix[:80])
    for name, item in value.items():
        path = f"{prefix}{name}" if isinstance(name, str | int) else f"{prefix}<{type(name).__name__}>"
        budget.charge(path)
        if isinstance(item, dict):
            yield from named_leaves(item, f"{path}.", (*above, id(value)), budget)
        else:
            yield path, item


def _endless(name: str) -> CheckpointError:
    return CheckpointError("hostile-pickle", "nested dicts hold too many names, or too long ones", where=name)


def is_tensor(value: PickleValue) -> bool:
    """Tells whether a value is a tensor, of a kind that is read or not."""
    if isinstance(value, TensorRef):
        return True
    return isinstance(value, Opaque) and (
        (value.type.module in ("torch._utils", "torch._tensor") and value.type.name.startswith("_rebuild"))
        or value.type.path in ("torch.Tensor", "torch.nn.parameter.Parameter")
    )


def unsupported_tensor(name: str, value: PickleValue) -> CheckpointError:
    """Returns the error for a leaf that is a tensor and is not read."""
    return CheckpointError(
        "unsupported-tensor",
        "a tensor of a kind that is not read: quantized, sparse, nested, meta, conjugate, or of an unknown type",
        where=name,
        found=value.type.path if isinstance(value, Opaque) else "",
        hint="where it is trusted, load it with torch and save what to_dense() or dequantize() gives",
    )


def no_tensors(root: PickleValue, key: str) -> CheckpointError:
    """Returns the error for a file without named tensors, or a root without any."""
    return CheckpointError(
        "no-tensors",
        f"no named tensors in {key!r}" if key else "no named tensors where checkpoints have them",
        found=_keys(root),
        hint=_hint(root, key),
    )


def _hint(root: PickleValue, key: str) -> str:
    return root_hint(list(islice(_roots(root), _MOST_ROOTS)), key)


def root_hint(roots: Sequence[str], key: str) -> str:
    """Returns the line that names a dict with tensors, the one most like the key that was asked for; empty for none."""
    best = max(roots, key=lambda root: len(os.path.commonprefix((root, key))), default="")  # reading imports nothing
    return f"say --root {best}, in a mapping `root: {best}`" if best else ""


def _roots(value: PickleValue, prefix: str = "", depth: int = 3) -> Iterator[str]:
    """Yields the dotted names of the dicts inside that hold tensors."""
    for name, item in islice(value.items(), _MOST_ROOTS) if isinstance(value, dict) and depth else ():
        if isinstance(item, dict):
            if any(is_tensor(leaf) for leaf in islice(item.values(), _MOST_ROOTS)):
                yield f"{prefix}{str(name)[:80]}"
            yield from _roots(item, f"{prefix}{str(name)[:80]}.", depth - 1)


def _keys(value: PickleValue) -> str:
    if isinstance(value, dict):
        return ", ".join(str(name)[:80] for name in list(value)[:20]) or "an empty dict"
    return value.type.path if isinstance(value, Opaque) else type(value).__name__
