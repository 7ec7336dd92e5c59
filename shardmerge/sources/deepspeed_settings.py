"""What the optimizer inside ZeRO's keeps beside its moments: steps, and the settings of its groups of parameters.

``base_optimizer_state`` (stages 1 and 2) and ``optimizer_state_dict`` (stage 3) are what torch's own optimizer saves:
``state`` and ``param_groups``, whose parameters are flat groups, or the sub-groups of stage 3, by their number.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

from shardmerge.sources.deepspeed_moments import no_moments
from shardmerge.sources.optimizer_settings import numbered_groups
from shardmerge.sources.pickle_values import PickleValue, TensorRef
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import TorchFile
from shardmerge.sources.value_digest import value_digest
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent, Strided
from shardmerge.tensors.optimizer import OptimizerState, ParameterGroup, Setting

# Whether weight decay is apart from the gradient (AdamW) or in it (Adam): torch says it so since 2.7.
DECOUPLED = "decoupled_weight_decay"


def base_state(state: Mapping[object, PickleValue]) -> Mapping[object, PickleValue]:
    """What the optimizer inside ZeRO's saved; nothing for ``elastic_checkpoint``, which saves a list of lean dicts."""
    return as_dict(state.get("base_optimizer_state") or state.get("optimizer_state_dict"))


def first_step(file: TorchFile, base: Mapping[object, PickleValue], numel: int) -> float | None:
    """Returns the optimizer's step counter: four bytes that tell two runs, or two moments of one run, apart."""
    moments = as_dict(base.get("state"))
    if not moments:  # Adam makes its moments in the first step; a rank may have nothing to train, SGD has no moments
        return 0.0 if numel and "state" in base and any("betas" in group for group in param_groups(base)) else None
    return _step(file, as_dict(next(iter(moments.values()))))


def param_groups(base: Mapping[object, PickleValue]) -> list[Mapping[object, PickleValue]]:
    """Returns the groups of parameters, as dicts."""
    groups = base.get("param_groups")
    return [as_dict(group) for group in groups] if isinstance(groups, list) else []


def plain_digest(base: Mapping[object, PickleValue]) -> str:
    """Returns a digest of the plain settings of all groups."""
    plain = (bool, int, float, str, tuple)
    found: list[PickleValue] = [
        {key: value for key, value in group.items() if isinstance(value, plain)} for group in param_groups(base)
    ]
    return sys.intern(value_digest(found))


def zero_optimizer(where: Path, files: Iterable[TorchFile], named: Sequence[Collection[str]]) -> OptimizerState:
    """Returns steps and settings.

    Parameters
    ----------
    where
        The tag directory, for messages.
    files
        The optimizer files, in rank order; only as many are read as tell every step.
    named
        The weights in each flat group, or sub-group.

    Raises
    ------
    CheckpointError
        ``no-moments``: they do not say them.
    """
    groups: tuple[ParameterGroup, ...] = ()
    steps: dict[int, float] = {}
    for file in files:
        base = base_state(as_dict(as_dict(file.root).get("optimizer_state_dict")))
        if not groups:
            listed = numbered_groups(file.path, param_groups(base), named)
            groups = told_groups(listed, as_dict(file.root).get("ds_config"))
        for number, state in as_dict(base.get("state")).items():
            step = _step(file, as_dict(state))
            if isinstance(number, int) and step is not None:  # a rank has none of a group that it has no part of
                steps.setdefault(number, step)
        if all(number in steps for number, names in enumerate(named) if names):
            return OptimizerState({name: steps[n] for n, names in enumerate(named) for name in names}, groups)
    raise no_moments(str(where), "no optimizer file that says its step")


def universal_optimizer(
    file: TorchFile, named: Sequence[Collection[str]], steps: Mapping[str, float], config: PickleValue
) -> OptimizerState:
    """Returns steps and settings of a universal checkpoint, from its ``optimizer_state.pt``.

    Parameters
    ----------
    file
        Groups stand at the top (stages 1 and 2), or where ZeRO-3 has them, with the steps of sub-groups.
    named
        The weights in each flat group, or sub-group.
    steps
        Of each weight, as far as files beside it say.
    config
        ``ds_config`` of the run.

    Raises
    ------
    CheckpointError
        ``no-moments``: it does not say them.
    """
    root = as_dict(file.root)
    base = root if "param_groups" in root else as_dict(root.get("optimizer_state_dict"))
    groups = told_groups(numbered_groups(file.path, param_groups(base), named), config)
    states = as_dict(as_dict(root.get("optimizer_state_dict")).get("state"))
    told = dict(steps)
    for number, names in enumerate(named):
        step = _step(file, as_dict(states.get(number)))
        told |= {name: step for name in names if step is not None and name not in steps}
    if any(name not in told for names in named for name in names):
        raise no_moments(file.path, "no file that says how often each weight was stepped")
    return OptimizerState(told, groups)


def told_groups(groups: Iterable[ParameterGroup], config: PickleValue) -> tuple[ParameterGroup, ...]:
    """Adds to the settings of DeepSpeed's own Adam which of the two it is, which ``ds_config`` says.

    ``Adam`` is AdamW too, unless ``adam_w_mode`` is false (``_configure_basic_optimizer`` in ``runtime/engine.py``).
    """
    said = as_dict(as_dict(config).get("optimizer"))
    name, mode = str(said.get("type")).lower(), as_dict(said.get("params")).get("adam_w_mode", True)
    told: dict[str, Setting] = {DECOUPLED: name == "adamw" or bool(mode)} if name in ("adam", "adamw") else {}
    return tuple(ParameterGroup(group.names, {**told, **group.settings}) for group in groups)


def _step(file: TorchFile, state: Mapping[object, PickleValue]) -> float | None:
    step = state.get("step")
    if isinstance(step, (int, float)):
        return float(step)
    if isinstance(step, TensorRef) and step.dtype.name == "F32" and prod(step.shape) == 1:
        return _read_float(file, step)
    return None


def _read_float(file: TorchFile, ref: TensorRef) -> float:
    held = file.entry("step", ref).pieces[0].held
    extent = held.extent if isinstance(held, Strided) else held
    assert isinstance(extent, Extent)  # a checkpoint's own tensors are not made of others
    with SourceFile(extent.file) as source:
        number: float = struct.unpack("<f", source.read(extent.offset, 4))[0]
    return number
