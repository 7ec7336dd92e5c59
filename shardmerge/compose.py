"""Ops over entries: a tensor made of tensors is an entry again. Pure; nothing is read.

Moves compile into views of what they move; a move of a move needs no arithmetic, and the engine reads it as a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from shardmerge.dtypes import DTYPES, DType
from shardmerge.errors import MappingError
from shardmerge.ops.casts import CASTABLE, Cast, Widen, exact
from shardmerge.ops.contract import Arithmetic, ColumnsLayout, Meta, Move, Op
from shardmerge.tensors import Columns, Composed, Made, Piece, TensorEntry, View, composed


def compose(op: Op, inputs: Sequence[TensorEntry]) -> TensorEntry:
    """Returns the entry that an op makes of others.

    Raises
    ------
    MappingError
        ``op-shape``, from the op.
    """
    if isinstance(op, Cast):
        return cast_to(inputs[0], op.target)
    if isinstance(op, Move):
        inputs = _one_dtype(inputs)
    metas = [Meta.of(entry) for entry in inputs]
    result = op.infer(metas)
    if not isinstance(op, Move):
        return _entry(result.dtype, result.shape, Made(tuple(inputs), op))
    layout = op.layout(metas)
    if isinstance(layout, ColumnsLayout):
        return _entry(result.dtype, result.shape, Columns(tuple(inputs), layout.rows, op))
    return _entry(result.dtype, result.shape, View(inputs[0], layout.offset, layout.shape, layout.strides, op))


def cast_to(entry: TensorEntry, dtype: DType) -> TensorEntry:
    """Returns the entry in another float type, rounded once.

    A cast that only widened on the way is undone rather than followed by a second one, and tensors side by side are
    cast each for itself, so that a copy stays a copy where it can. Integers stay integers.

    Raises
    ------
    MappingError
        ``cannot-cast``: a type that no cast leads from or to.
    """
    if entry.dtype == dtype or entry.dtype.kind != "float":
        return entry
    held = composed(entry)
    if isinstance(held, Made) and isinstance(held.recipe, Cast) and exact(held.recipe):
        return cast_to(held.bases[0], dtype)
    if isinstance(held, Columns):
        bases = tuple(cast_to(base, dtype) for base in held.bases)
        return _entry(dtype, entry.shape, Columns(bases, held.rows, held.recipe))
    if entry.dtype.name not in CASTABLE or dtype.name not in CASTABLE:
        raise MappingError("cannot-cast", f"{entry.dtype} cannot be cast to {dtype}")
    return _entry(dtype, entry.shape, Made((entry,), Cast(entry.dtype, dtype)))


def own_dtype(entry: TensorEntry) -> DType:
    """Returns the type a tensor keeps where nobody asks for another: that of the tensor it is essentially made of."""
    held = composed(entry)
    if held is None or not held.bases or entry.dtype.kind != "float":
        return entry.dtype
    if isinstance(held.recipe, Cast) and not isinstance(held.recipe, Widen):
        return entry.dtype
    if isinstance(held.recipe, Arithmetic) and held.recipe.own is not None:
        return held.recipe.own
    like = held.recipe.like if isinstance(held.recipe, Arithmetic) else 0
    return own_dtype(held.bases[like])


def _entry(dtype: DType, shape: tuple[int, ...], held: Composed) -> TensorEntry:
    numel = prod(shape)
    return TensorEntry("", dtype, shape, (Piece(0, numel, held),) if numel else ())


def _one_dtype(inputs: Sequence[TensorEntry]) -> Sequence[TensorEntry]:
    """Moves need one type: floats are widened exactly where they differ, and the final cast takes the detour back."""
    dtypes = {entry.dtype for entry in inputs}
    if len(dtypes) < 2 or any(dtype.kind != "float" for dtype in dtypes):
        return inputs  # if they differ, the op says so
    order = sorted(dtypes, key=lambda dtype: dtype.itemsize)
    common = next(wide for wide in (order[-1], DTYPES["F32"], DTYPES["F64"]) if all(_widens(d, wide) for d in dtypes))
    return [entry if entry.dtype == common else _widened(entry, common) for entry in inputs]


def _widened(entry: TensorEntry, dtype: DType) -> TensorEntry:
    return _entry(dtype, entry.shape, Made((entry,), Widen(entry.dtype, dtype)))


def _widens(source: DType, target: DType) -> bool:
    return source == target or exact(Cast(source, target))
