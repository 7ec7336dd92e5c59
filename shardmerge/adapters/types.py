"""The type of what was trained beside what was frozen: one model has one, unless the mapping says another. Pure.

DeepSpeed keeps float32 masters of what it trains; the run computed with their 16-bit copies, as it did with the frozen
weights. peft copies trained modules into those that they replace. So both get the type of what is frozen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace

from shardmerge.compose import cast_to
from shardmerge.dtypes import DType
from shardmerge.mapping.near import count
from shardmerge.tensors import Catalog, TensorEntry

# How the reader of DeepSpeed's checkpoints calls parameters that had no optimizer.
_FROZEN = "frozen"
_WITH_MASTERS = "DeepSpeed"


def is_frozen(entry: TensorEntry) -> bool:
    """Tells whether the checkpoint says of a tensor that it was not trained."""
    return entry.origin.startswith(_FROZEN)


def as_replaced(entry: TensorEntry, old: TensorEntry) -> TensorEntry:
    """Returns a trained tensor in the type of the one that it replaces."""
    both = entry.dtype.kind == old.dtype.kind == "float"
    return replace(cast_to(entry, old.dtype), name=entry.name, origin=entry.origin) if both else entry


def as_frozen(catalog: Catalog) -> Catalog:
    """Returns the base that a run holds, all of it in the type of what was frozen; told where that changes some."""
    frozen = [entry for entry in catalog.entries.values() if is_frozen(entry)]
    return _without_masters(catalog, _type_of(frozen), frozenset())


def as_base(run: Catalog, base: Catalog, merged: Collection[str]) -> Catalog:
    """Returns a run with what it trained beside its adapter, such as a projector, in the type of its base.

    ``merged`` are its tensors that are part of the base by now. What is no checkpoint of DeepSpeed has no masters.
    """
    if not run.kind.startswith(_WITH_MASTERS):
        return run
    return _without_masters(run, _type_of(base.entries.values()), merged)


def _without_masters(catalog: Catalog, dtype: DType | None, merged: Collection[str]) -> Catalog:
    if dtype is None or dtype.name not in ("BF16", "F16"):
        return catalog
    masters = {
        name: replace(cast_to(entry, dtype), name=name, origin=entry.origin)
        for name, entry in catalog.entries.items()
        if entry.dtype.name == "F32" and not is_frozen(entry) and name not in merged
    }
    if not masters:
        return catalog
    text = (
        f"{count(len(masters), 'trained tensor')} of F32 beside frozen ones of {dtype}: written as {dtype}, the type "
        "that the run computed with; `dtype: float32` under `output:` keeps the masters"
    )
    return replace(catalog, entries={**catalog.entries, **masters}, warnings=(*catalog.warnings, text))


def _type_of(entries: Iterable[TensorEntry]) -> DType | None:
    """Returns the float type that most elements have."""
    found: Counter[DType] = Counter()
    for entry in entries:
        if entry.dtype.kind == "float":
            found[entry.dtype] += entry.numel
    return found.most_common(1)[0][0] if found else None
