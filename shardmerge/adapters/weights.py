"""One weight and what an adapter has for it, as one entry: which op over which views. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shardmerge.compose import cast_to, compose
from shardmerge.ops.cutting import Slice
from shardmerge.ops.dora import Dora, DoraOnto
from shardmerge.ops.joining import Concat
from shardmerge.ops.lora import Lora
from shardmerge.ops.rearranging import Permute, Reshape
from shardmerge.tensors import TensorEntry


def merged_weight(
    base: TensorEntry,
    untouched: TensorEntry | None,
    a: TensorEntry,
    b: TensorEntry,
    magnitude: TensorEntry | None,
    scale: float,
    *,
    turned: bool,
) -> TensorEntry:
    """Returns the merged weight.

    Parameters
    ----------
    base
        As it is now.
    untouched
        As it was before other adapters changed it; None where none has. DoRA's norm is over this one.
    a, b, magnitude
        ``[r, in]``, ``[out, r]``, ``[out]`` or any shape of as many elements; a convolution's A ``[r, in, kh, kw]`` and
        B ``[out, r, 1, 1]`` are matrices over flattened kernels.
    turned
        The base is ``[in, out]``: embeddings, GPT-2's Conv1D.

    Raises
    ------
    MappingError
        ``op-shape``.
    """
    if len(base.shape) > 2:
        before = None if untouched is None else _matrix(untouched)
        merged = merged_weight(_matrix(base), before, _matrix(a), _matrix(b), magnitude, scale, turned=False)
        return compose(Reshape(base.shape), [merged])
    if magnitude is None:
        return compose(Lora(scale), [*((_turned(b), _turned(a)) if turned else (a, b)), base])
    magnitude = compose(Reshape((-1,)), [magnitude])
    weights = [base] if untouched is None else [untouched, base]
    op = Dora(scale) if untouched is None else DoraOnto(scale)
    if not turned:
        return compose(op, [a, b, magnitude, *weights])
    return _turned(compose(op, [a, b, magnitude, *map(_turned, weights)]))


def with_rows(base: TensorEntry, rows: TensorEntry, places: Sequence[int]) -> TensorEntry:
    """Returns ``base`` ``[n, ...]`` with some rows replaced, in the base's type as in peft.

    Parameters
    ----------
    rows, places
        ``[k, ...]``, and k different numbers below n: row i goes to ``places[i]``.
    """
    rows = cast_to(rows, base.dtype)
    parts: list[TensorEntry] = []
    done = 0
    for place, row in sorted((place, row) for row, place in enumerate(places)):
        if place > done:
            parts.append(compose(Slice(0, done, place), [base]))
        parts.append(compose(Slice(0, row, row + 1), [rows]))
        done = place + 1
    if done < base.shape[0]:
        parts.append(compose(Slice(0, done, base.shape[0]), [base]))
    return compose(Concat(0), parts)


def _turned(entry: TensorEntry) -> TensorEntry:
    return compose(Permute(), [entry])


def _matrix(entry: TensorEntry) -> TensorEntry:
    return compose(Reshape((entry.shape[0], -1)), [entry]) if entry.shape else entry
