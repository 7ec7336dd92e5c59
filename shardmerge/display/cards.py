"""The card of each public value."""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch
from math import prod

from shardmerge.display.card import Card, Kind
from shardmerge.lazy import LazyCheckpoint
from shardmerge.mapping.preset_files import Preset
from shardmerge.plan.catalog_tree import human_count
from shardmerge.plan.shard import PlannedTensor, is_copy
from shardmerge.plan.tables import human_bytes
from shardmerge.plan.value import Plan
from shardmerge.publish.comparing import Comparison
from shardmerge.publish.results import Result
from shardmerge.publish.verify import Verdict
from shardmerge.tensors import Catalog, leaves

# Of a plan's id.
_SHORT_ID = 16


@singledispatch
def card(value: object) -> Card:
    """Returns what is to be shown of a value."""
    raise TypeError(f"there is no card of a {type(value).__name__}")


@card.register
def _(plan: Plan) -> Card:
    sources = [(source.name, f"{source.kind}, {source.path}") for source in plan.sources]
    facts = (*sources, ("not used", f"{len(plan.unused)} source tensors"), ("id", plan.id[:_SHORT_ID]))
    tensors = [(tensor.name, (tensor.shape, tensor.dtype, _origin(tensor))) for tensor in plan.tensors()]
    return Card(
        f"Plan of {plan.target}: {_size(tensors)} in {_counted(len(plan.shards), 'file')}",
        tuple(fact for fact in facts if not fact[1].startswith("0 ")),
        ("source", _shares((kind[2], _nbytes(kind)) for _, kind in tensors)),
        tensors,
        plan.warnings,
    )


@card.register
def _(result: Result) -> Card:
    planned = card(result.plan)
    overflows = result.outcome.overflows
    beyond = (f"{len(overflows)} tensors hold numbers that are infinite in their new type: {', '.join(overflows)}",)
    return Card(
        planned.title.replace("Plan", "Result", 1),
        (("path", str(result.path)), *planned.facts),
        planned.shares,
        planned.tensors,
        (*(beyond if overflows else ()), *planned.warnings),
    )


@card.register
def _(catalog: Catalog) -> Card:
    tensors = [(name, (entry.shape, entry.dtype, "")) for name, entry in catalog.entries.items()]
    tied = ", ".join(f"{alias} = {owner}" for alias, owner in catalog.aliases.items())
    facts = (
        ("path", catalog.path),
        ("files", f"{len(catalog.files):,}, {human_bytes(sum(one.size for one in catalog.files))}"),
        ("beside", ", ".join(catalog.side_files)),
        ("tied", tied),
        ("without data", ", ".join(sorted(catalog.absent))),
        *(("note", note) for note in catalog.notes),
    )
    return Card(
        f"{catalog.kind}: {_size(tensors)}",
        tuple(fact for fact in facts if fact[1]),
        ("type", _by_type(tensors)),
        tensors,
        catalog.warnings,
    )


@card.register
def _(checkpoint: LazyCheckpoint) -> Card:
    tensors = [(name, (one.shape, one.dtype, "")) for name, one in checkpoint.items()]
    title = f"{checkpoint.kind}: {_size(tensors)}, not in memory"
    notes = tuple(("note", note) for note in checkpoint.notes)
    return Card(title, notes, ("type", _by_type(tensors)), tensors)


@card.register
def _(preset: Preset) -> Card:
    roles = ((name, role.about if role.required else f"{role.about} (optional)") for name, role in preset.roles.items())
    facts = (
        *roles,
        ("target", preset.target.name if preset.target else ""),
        ("numbers", ", ".join(preset.variables)),
        ("about", " ".join(preset.description.split())),
    )
    rules = tuple(rule.target.text for rule in preset.rules)
    title = f"Preset {preset.name}: {preset.title}"
    return Card(title, tuple(fact for fact in facts if fact[1]), items=(_counted(len(rules), "rule"), rules))


@card.register
def _(found: Comparison) -> Card:
    title = f"Comparison: {_counted(len(found), 'difference')}, {found.equal:,} equal, {found.close:,} close"
    return Card(title, tuple((one.name, f"{one.what}: {one.detail}") for one in found.differences))


@card.register
def _(verdict: Verdict) -> Card:
    size = f"{_counted(verdict.tensors, 'tensor')}, {human_bytes(verdict.nbytes)}"
    return Card(f"Verified: {size}", tuple(("ok", check) for check in verdict.checks), warnings=verdict.unchecked)


def _origin(tensor: PlannedTensor) -> str:
    """Returns the sources of a tensor, and that it is not copied where it is not."""
    names = " + ".join(dict.fromkeys(leaf.source for leaf in leaves(tensor.entry))) or "no source"
    return names if is_copy(tensor.entry) else f"{names}, computed"


def _size(tensors: list[tuple[str, Kind]]) -> str:
    """Returns number, parameters and bytes of tensors."""
    kinds = [kind for _, kind in tensors]
    parameters, nbytes = sum(prod(kind[0]) for kind in kinds), sum(map(_nbytes, kinds))
    return f"{_counted(len(kinds), 'tensor')}, {human_count(parameters)} parameters, {human_bytes(nbytes)}"


def _nbytes(kind: Kind) -> int:
    return prod(kind[0]) * kind[1].itemsize


def _shares(parts: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Returns labels and their bytes, the largest first."""
    found: dict[str, int] = {}
    for label, nbytes in parts:
        found[label] = found.get(label, 0) + nbytes
    return tuple(sorted(found.items(), key=lambda item: -item[1]))


def _by_type(tensors: list[tuple[str, Kind]]) -> tuple[tuple[str, int], ...]:
    return _shares((kind[1].name, _nbytes(kind)) for _, kind in tensors)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
