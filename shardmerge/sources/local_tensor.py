"""What one rank holds of a tensor that its run had sharded: what DTensor and ShardedTensor have in common.

Both are tensors without data of their own, which torch rebuilds with ``_rebuild_wrapper_subclass``; their parts and
places are in the state beside.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.dtypes import BY_TORCH_NAME, DType
from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_bounds import are_sizes
from shardmerge.sources.pickle_values import Global, Opaque, PickleValue, TensorRef
from shardmerge.tensors import Shape


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """What one rank holds of a tensor.

    Attributes
    ----------
    dtype, shape
        Of the whole tensor.
    parts
        Offsets, and the elements that lie there; none where the rank holds nothing of it.
    ranks
        How many ranks share the tensor; 1 where it is not sharded.
    world
        How many ranks the run had, as far as the tensor says.
    mesh
        For people: ``"dp 2 x tp 2"``, or ``""``.
    """

    dtype: DType
    shape: Shape
    parts: tuple[tuple[tuple[int, ...], TensorRef], ...]
    ranks: int = 1
    world: int = 1
    mesh: str = ""


def is_wrapped(value: PickleValue) -> bool:
    """Tells whether a value is a tensor subclass without data of its own, as DTensor and ShardedTensor are."""
    return (
        isinstance(value, Opaque)
        and value.type.name == "_rebuild_from_type_v2"
        and len(value.args) == 4
        and isinstance(value.args[0], Global)
        and value.args[0].name == "_rebuild_wrapper_subclass"
    )


def whole_of(wrapped: Opaque, where: str) -> tuple[DType, Shape]:
    """Returns element type and shape of the whole tensor, from ``_rebuild_wrapper_subclass``'s arguments.

    They are class, dtype, size, strides, offset, layout, device, requires_grad (``torch/_utils.py``).
    """
    args = wrapped.args[2]
    if isinstance(args, tuple) and len(args) > 3 and isinstance(args[1], Global) and are_sizes(args[2]):
        dtype = BY_TORCH_NAME.get(args[1].name)
        if dtype is not None:
            return dtype, tuple(args[2])
    raise damaged_dtensor("a sharded tensor does not say its type and shape", where)


def damaged_dtensor(what: str, where: str, found: str = "", expected: str = "") -> CheckpointError:
    """Returns the error for a sharded tensor whose description does not hold together."""
    return CheckpointError("damaged-dtensor", what, where=where, found=found, expected=expected)


def unsupported(what: str, where: str, found: str) -> CheckpointError:
    """Returns the error for a sharded tensor of a kind that is not read."""
    return CheckpointError(
        "unsupported-tensor",
        what,
        where=where,
        found=found,
        hint="load it in the run that wrote it, and save what torch.distributed.checkpoint.state_dict's"
        " get_model_state_dict gives with StateDictOptions(full_state_dict=True)",
    )
