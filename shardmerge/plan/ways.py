"""What happens to a tensor on its way, in words: ``131 -> 192 rows (new rows: mean), F32 -> BF16``. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shardmerge.dtypes import DType
from shardmerge.tensors import Columns, Composed, TensorEntry, composed

# How the words of ``ops.vocabulary.NewRows`` begin.
_NEW_ROWS = "new rows"


def way_of(entry: TensorEntry) -> str:
    """Returns what is done to make a tensor, first things first; ``copied`` where its bytes stay as they are.

    The type is told once, from the source's to the result's, whatever is between.
    """
    stored = _stored(entry)
    types = [f"{stored} -> {entry.dtype}"] if stored is not None and stored != entry.dtype else []
    return ", ".join([*dict.fromkeys(_words(entry)), *types]) or "copied"


def _words(entry: TensorEntry) -> Iterator[str]:
    held = composed(entry)
    if held is None:
        return
    grown = _grown(entry, held)
    for base in held.bases[:1] if grown else held.bases:
        yield from _words(base)
    said = grown or held.recipe.words(held.bases)
    if said:
        yield said


def _grown(entry: TensorEntry, held: Composed) -> str:
    """Returns how a vocabulary grew: old rows, and behind them new ones; empty where it did not."""
    if not isinstance(held, Columns) or len(held.bases) != 2:
        return ""
    old, new = held.bases
    made = composed(_uncast(new))
    how = made.recipe.words(made.bases) if made else ""
    return f"{old.shape[0]} -> {entry.shape[0]} rows ({how})" if how.startswith(_NEW_ROWS) else ""


def _uncast(entry: TensorEntry) -> TensorEntry:
    """Returns what is below casts: whatever says nothing."""
    held = composed(entry)
    silent = held is not None and len(held.bases) == 1 and not held.recipe.words(held.bases)
    return _uncast(held.bases[0]) if held is not None and silent else entry


def _stored(entry: TensorEntry) -> DType | None:
    """Returns the type of the source whose type the result would keep; None where it is made of nothing."""
    held = composed(entry)
    while held is not None and held.bases:
        entry = held.bases[held.recipe.like]
        held = composed(entry)
    return entry.dtype if held is None and entry.name else None
