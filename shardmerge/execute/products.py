"""Where a plan multiplies matrices, numpy's BLAS has one thread for as long as it is carried out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from shardmerge.ops.contract import Arithmetic
from shardmerge.tensors import Columns, Made, TensorEntry, View


def one_thread_for(entries: Iterable[TensorEntry]) -> AbstractContextManager[object]:
    """Returns what to carry out tensors in; looks for the BLAS, which takes 8 ms, only where one multiplies."""
    if not any(_multiplies(entry) for entry in entries):
        return nullcontext()
    from shardmerge.ops.blas import one_thread

    return one_thread()


def _multiplies(entry: TensorEntry) -> bool:
    held = entry.pieces[0].held if entry.pieces else None
    if isinstance(held, Made) and isinstance(held.recipe, Arithmetic) and held.recipe.multiplies:
        return True
    bases = held.bases if isinstance(held, (View, Columns, Made)) else ()
    return any(_multiplies(base) for base in bases)
