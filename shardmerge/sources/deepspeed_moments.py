"""The moments of Adam in the optimizer files of ZeRO: flat and partitioned over the ranks as the fp32 masters are.

``base_optimizer_state`` (stages 1 and 2) and ``optimizer_state_dict`` (stage 3) hold what torch's own optimizer saves:
``state``, by the number of its parameter, which is a flat group or sub-group. The padding that is cut off the masters
of stages 1 and 2 is still there (``runtime/zero/stage_1_and_2.py``, DeepSpeed 0.9 to 0.19).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_values import PickleValue, TensorRef
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import TorchFile

# What torch's Adam keeps of a parameter, and DeepSpeed's own.
_OF_ADAM = frozenset({"exp_avg", "exp_avg_sq", "step"})


def moment_flats(
    file: TorchFile, base: Mapping[object, PickleValue], masters: Sequence[TensorRef], kind: str
) -> tuple[TensorRef, ...]:
    """Returns the moments of a rank, one flat tensor for each of its masters and of its length.

    Raises
    ------
    CheckpointError
        ``no-moments``: a group has none of this kind, or not one number for each master, or it keeps more than Adam
        does, which would be lost.
    """
    states = as_dict(base.get("state"))
    odd = sorted({str(key) for state in states.values() for key in as_dict(state)} - _OF_ADAM)
    if odd:
        raise no_moments(file.path, f"it keeps {', '.join(odd)} besides", f"no more than {', '.join(sorted(_OF_ADAM))}")
    return tuple(
        _flat(file, as_dict(states.get(n)).get(kind), ref, f"{kind} of group {n}") for n, ref in enumerate(masters)
    )


def _flat(file: TorchFile, found: PickleValue, master: TensorRef, what: str) -> TensorRef:
    numel = prod(master.shape)
    if not numel:
        return master
    if not isinstance(found, TensorRef) or len(found.shape) != 1 or found.shape[0] < numel:
        raise no_moments(file.path, what, f"{numel:,} numbers, one for each weight that the rank steps")
    return replace(found, shape=(numel,))


def no_moments(path: str, what: str, expected: str = "") -> CheckpointError:
    """Returns the error of a checkpoint whose optimizer cannot be taken along."""
    return CheckpointError(
        "no-moments",
        f"the optimizer files have no moments of Adam that could be taken along: {what}",
        where=path,
        expected=expected,
        hint="leave --with-optimizer out: the optimizer then begins anew",
    )
