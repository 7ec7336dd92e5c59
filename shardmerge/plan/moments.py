"""The moments of Adam as tensors of a plan, beside the weights that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from shardmerge.plan.shard import PlannedTensor
from shardmerge.tensors import FileStamp, TensorEntry
from shardmerge.tensors.optimizer import OptimizerState

# As torch calls them.
KINDS = ("exp_avg", "exp_avg_sq")

_PREFIXES = tuple(f"{kind}:" for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Moments:
    """What an optimizer remembers of the weights that it steps.

    Attributes
    ----------
    entries
        By kind (``exp_avg``, ``exp_avg_sq``) and name of the weight.
    optimizer
        Steps and settings, by name of the weight too.
    files
        That they are in, and that say it.
    warnings
        What a user has to know of them.
    """

    entries: Mapping[str, Mapping[str, TensorEntry]]
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    files: tuple[FileStamp, ...] = ()
    warnings: tuple[str, ...] = ()


NO_MOMENTS = Moments({kind: {} for kind in KINDS})


def moment_tensors(tensors: Iterable[PlannedTensor], moments: Moments) -> Iterator[tuple[str, str, PlannedTensor]]:
    """Yields kind, weight and tensor of every moment that is taken along; ``stored`` stays the weight's."""
    listed = list(tensors)
    for kind, entries in moments.entries.items():
        for one in (tensor for tensor in listed if tensor.stored in entries):
            yield kind, one.stored, replace(one, name=f"{kind}:{one.name}", entry=entries[one.stored])


def is_moment(tensor: PlannedTensor) -> bool:
    """Tells whether a tensor of a plan is no weight of the model."""
    return tensor.name.startswith(_PREFIXES)
