"""The optimizer in a distributed checkpoint of torch: what ``get_state_dict`` and ``dcp.save`` make of Adam and AdamW.

::

    optim.state.<weight>.exp_avg, .exp_avg_sq     tensors of the weight's shape
    optim.state.<weight>.step                     a tensor of no axes, float32
    optim.param_groups.0.lr                       an object, torch.save of the value; so each setting of each group
    optim.param_groups.0.params                   an object: the names of the group's weights
    optim.param_groups.<weight>.lr                the same with ``flatten_optimizer_state_dict``, without ``params``

Both forms of ``param_groups`` are there, since a loader asks for one of them: torchtitan and OLMo-core for the flat
one. Equal objects are one item, to which many names lead.

Source: ``torch/distributed/checkpoint/state_dict.py`` and ``_traverse.py`` of torch 2.13, and what they write.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from shardmerge.dtypes import DTYPES, DType
from shardmerge.plan.dcp_layout import Keys
from shardmerge.plan.pickle_values import PickledValue, pickled
from shardmerge.plan.torch_layout import torch_file
from shardmerge.plan.torch_pickle import tensor_pickle
from shardmerge.tensors import Shape
from shardmerge.tensors.optimizer import OptimizerState, ParameterGroup, Setting

# Beside the model's ``model``, as torch's recipes and OLMo-core have it; torchtitan, whose model is at the top, has the
# other.
_BESIDE, _AT_TOP = "optim", "optimizer"
_ARCHIVE = "archive"

# What a step is, in a file of items.
SCALAR: tuple[DType, Shape] = (DTYPES["F32"], ())

# What torch's AdamW has in a group of parameters besides, and DeepSpeed's own Adam has not: how it steps, not where to.
_SWITCHES: Mapping[str, Setting] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


def optimizer_root(model: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the keys of the optimizer in a state dict, beside those of the model."""
    return (*model[:-1], _BESIDE) if model else (_AT_TOP,)


def moment_keys(root: tuple[str, ...], weight: str, kind: str) -> Keys:
    """Returns the keys of a moment below the optimizer's."""
    return (*root, "state", weight, kind)


def step_items(root: tuple[str, ...], optimizer: OptimizerState) -> Iterator[tuple[Keys, bytes]]:
    """Yields the keys and the item of each weight's step: a float32 tensor of no axes."""
    pickle = tensor_pickle(*SCALAR)
    items: dict[float, bytes] = {}
    for weight, step in optimizer.steps.items():
        if step not in items:
            items[step] = torch_file(pickle, (struct.pack("<f", step),), _ARCHIVE)
        yield moment_keys(root, weight, "step"), items[step]


def setting_items(root: tuple[str, ...], optimizer: OptimizerState) -> Iterator[tuple[Keys, bytes]]:
    """Yields the keys and the item of every object: settings of groups, and of each weight, and names."""
    for number, group in enumerate(optimizer.groups):
        items = {key: _object(value) for key, value in _settings(group).items()}
        for key, item in items.items():
            yield (*root, "param_groups", number, key), item
        yield (*root, "param_groups", number, "params"), _object(list(group.names))
        for weight in group.names:
            yield from (((*root, f"param_groups.{weight}.{key}"), item) for key, item in items.items())


def _settings(group: ParameterGroup) -> dict[str, Setting]:
    return {**group.settings, **{key: value for key, value in _SWITCHES.items() if key not in group.settings}}


def _object(value: Setting) -> bytes:
    """Returns ``torch.save`` of a plain value."""
    return torch_file(pickled(_as_pickled(value)), (), _ARCHIVE)


def _as_pickled(value: Setting) -> PickledValue:
    if isinstance(value, list):
        return [_as_pickled(one) for one in value]
    return tuple(_as_pickled(one) for one in value) if isinstance(value, tuple) else value
