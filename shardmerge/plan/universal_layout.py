"""The small files of a universal checkpoint of DeepSpeed around its weights: what ``load_checkpoint`` asks for besides.

::

    latest_universal                                  the name of the folder
    universal/mp_rank_00_model_states.pt              what the engine keeps, read at stages 1 and 2
    universal/zero_pp_rank_0_mp_rank_00_model_states.pt       the same, read at stage 3
    universal/zero/optimizer_state.pt                 what the optimizer keeps beside its tensors
    universal/zero/<parameter>/fp32.pt                {"param": the weight}
    universal/zero/<parameter>/{exp_avg,exp_avg_sq,step}.pt   the moments of Adam

Moments that are not taken along are those of an optimizer that has not begun: zeros, of one element that is seen
everywhere (strides of 0), so they take no space; stage 3 loads nothing without them. A parameter group of the trainer
is loaded only where the file has one too, so it has as many as anybody makes, each without a setting: those of the
trainer stay.

Source: DeepSpeed 0.19.8, ``load_checkpoint`` in ``runtime/engine.py``, ``load_hp_checkpoint_state`` in
``checkpoint/universal_checkpoint.py`` and ``runtime/zero/stage3.py``, ``runtime/base_optimizer.py``, and what its
``checkpoint/ds_to_universal.py`` writes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache

from shardmerge.plan.moments import KINDS, NO_MOMENTS, Moments
from shardmerge.plan.pickle_values import PickledCall, PickledDict, PickledName, PickledStorage, PickledValue, pickled
from shardmerge.plan.torch_layout import torch_file
from shardmerge.tensors import Shape

FOLDER = "universal"
LATEST = "latest_universal"

# What a file of weights calls its tensor.
PARAM = "param"

# The version whose files these are; older ones than 0.3.17 are not loaded at stage 1.
_DEEPSPEED = "0.19.8"
# transformers makes two parameter groups, rates by layer some dozens.
_GROUPS = 1024
# A model has few shapes.
_KINDS = 4096

_ORDERED_DICT = PickledCall(PickledName("collections", "OrderedDict"), ())
_SIZE = PickledName("torch", "Size")


def tensor_path(name: str, kind: str = "fp32") -> str:
    """Returns the path of the file of one weight, or of a moment of it."""
    return f"{FOLDER}/zero/{name}/{kind}.pt"


def weight_at(path: str) -> tuple[str, str]:
    """Returns the checkpoint's own folder and the name of the weight in a file, ``("", "")`` for any other file."""
    before, zero, rest = path.rpartition(f"{FOLDER}/zero/")
    name, _, file = rest.rpartition("/")
    return (before.rstrip("/"), name) if zero and file == "fp32.pt" else ("", "")


def universal_files(shapes: Mapping[str, Shape], moments: Moments = NO_MOMENTS) -> Iterator[tuple[str, bytes]]:
    """Yields every small file by its path, of a checkpoint with weights of these names and shapes.

    Moments that are there have files of their own.
    """
    states = torch_file(pickled(_states(shapes)), (), "mp_rank_00_model_states")
    yield LATEST, FOLDER.encode()
    yield f"{FOLDER}/mp_rank_00_model_states.pt", states
    yield f"{FOLDER}/zero_pp_rank_0_mp_rank_00_model_states.pt", states
    steps = moments.optimizer.steps
    last = max(steps.values(), default=0.0)
    yield f"{FOLDER}/zero/optimizer_state.pt", _file_of_one(_optimizer(), "optimizer_state", last)
    for name, shape in shapes.items():
        missing = (kind for kind in KINDS if name not in moments.entries[kind])
        yield from ((tensor_path(name, kind), _zero_moment(shape, kind)) for kind in missing)
        yield tensor_path(name, "step"), _step(steps.get(name, last))


@lru_cache(maxsize=_KINDS)
def _zero_moment(shape: Shape, kind: str) -> bytes:
    return _file_of_one(_dict(param=_all_alike(shape)), kind, 0.0)


@lru_cache(maxsize=_KINDS)
def _step(number: float) -> bytes:
    return _file_of_one(_all_alike(()), "step", number)


def _file_of_one(value: PickledValue, archive: str, number: float) -> bytes:
    """Returns a file whose storage is one float32."""
    return torch_file(pickled(value), (struct.pack("<f", number),), archive)


def _all_alike(shape: Shape) -> PickledCall:
    """Returns a tensor of float32 whose elements are all the first of the storage."""
    storage, strides = PickledStorage("FloatStorage", "0", 1), (0,) * len(shape)
    return PickledCall(
        PickledName("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, _ORDERED_DICT)
    )


def _optimizer() -> PickledDict:
    """What stages 1 and 2 take (``param_groups``, ``ds_version``), and stage 3 (``optimizer_state_dict``)."""
    groups: list[PickledValue] = [_dict() for _ in range(_GROUPS)]
    state = PickledDict([(0, _dict(step=_all_alike(())))])
    return _dict(
        optimizer_state_dict=_dict(state=state, param_groups=groups), param_groups=groups, ds_version=_DEEPSPEED
    )


def _states(shapes: Mapping[str, Shape]) -> PickledDict:
    """The state of an engine before its first step. The module is not read: weights are those under ``zero``."""
    sizes = PickledDict((name, PickledCall(_SIZE, (shape,))) for name, shape in shapes.items())
    return _dict(
        module=_dict(),
        buffer_names=[],
        optimizer=None,
        param_shapes=[sizes],
        frozen_param_shapes=None,
        frozen_param_fragments=None,
        shared_params=_dict(),
        lr_scheduler=_SCHEDULE,
        data_sampler=None,
        random_ltd=None,
        skipped_steps=0,
        global_steps=0,
        global_samples=0,
        dp_world_size=1,
        mp_world_size=1,
        ds_config=_dict(),
        ds_version=_DEEPSPEED,
        universal_checkpoint_info=_dict(),
    )


def _dict(**fields: PickledValue) -> PickledDict:
    return PickledDict(list(fields.items()))


# A schedule that has not begun, of those of torch (which take any keys, and ``LambdaLR`` this one) and of DeepSpeed's.
_SCHEDULE = _dict(lr_lambdas=[], last_batch_iteration=-1)
