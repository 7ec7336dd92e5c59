"""What is merged into what: adapters one by one, or several combined first; and runs that hold their base. Pure.

Merged one after the other, adapters add up: peft's ``combination_type="cat"``, and its adapters active side by side.
Its ``linear`` is another sum: A and B are each added up, and multiplied then, so that parts of one adapter meet parts
of another (peft 0.21, ``LoraModel._generalized_task_arithmetic_weighted_adapter``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import copysign, sqrt

from shardmerge.adapters.held import held_base
from shardmerge.adapters.parts import AdapterTensors, sort_adapter
from shardmerge.adapters.roots import PREFIX
from shardmerge.adapters.settings import AdapterSettings, read_adapter_settings
from shardmerge.compose import compose
from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.mapping.near import listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.ops.pointwise import Linear
from shardmerge.tensors import Catalog, ReadSideFile, TensorEntry
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

_APART = "prunes A and B apart, so that what is left is no part of either adapter's product"
_AT_RANDOM = f"{_APART}, and draws at random what it prunes"
_ROUNDED = "rounds the sum to a rank, for which a merged weight has no need"
# The other types of peft's `add_weighted_adapter`, and why none of them is a merge.
_REFUSED = {
    "svd": _ROUNDED, "ties": _APART, "magnitude_prune": _APART, "dare_linear": _AT_RANDOM, "dare_ties": _AT_RANDOM,
    "ties_svd": _ROUNDED, "magnitude_prune_svd": _ROUNDED, "dare_linear_svd": _AT_RANDOM, "dare_ties_svd": _AT_RANDOM,
}  # fmt: skip
_PAIRS = {
    ("a", "b"): ("lora_A.weight", "lora_B.weight"),
    ("embedding_a", "embedding_b"): ("lora_embedding_A", "lora_embedding_B"),
}


@dataclass(frozen=True, slots=True)
class AdapterJob:
    """An adapter and where it goes.

    Attributes
    ----------
    spec, adapter
        As the mapping says, or the combination of several.
    held
        The base, where the adapter's own checkpoint holds it.
    also
        (source, name) of the tensors that it was combined of.
    """

    spec: AdapterSpec
    adapter: Catalog
    held: Catalog | None = None
    also: frozenset[tuple[str, str]] = frozenset()


def jobs(
    specs: Sequence[AdapterSpec],
    catalogs: Mapping[str, Catalog],
    read: ReadSideFile,
    problems: list[ShardmergeError],
    *,
    typed: bool,
) -> Iterator[AdapterJob]:
    """Yields what is to be merged, in the order of the mapping; what is wrong goes to ``problems``."""
    there = [spec for spec in specs if spec.source.source in catalogs and spec.onto.source in catalogs]
    done = set[tuple[str, str]]()
    helds: dict[str, Catalog | None] = {}
    for spec in there:  # one that is not there was declared `required: false`
        try:
            way = _way(spec)
            if way == "linear" and _onto(spec) in done:
                continue
            if way == "linear":
                done.add(_onto(spec))
                yield _combined(
                    [one for one in there if _onto(one) == _onto(spec) and _way(one) == way], catalogs, read
                )
                continue
            adapter, base = catalogs[spec.source.source], catalogs[spec.onto.source]
            own = adapter.path == base.path
            if own and spec.onto.source not in helds:
                helds[spec.onto.source] = held_base(base, spec.onto.template, typed=typed)
            yield AdapterJob(spec, adapter, helds[spec.onto.source] if own else None)
        except ShardmergeError as error:
            problems += error.each()


def _onto(spec: AdapterSpec) -> tuple[str, str]:
    return spec.onto.source, spec.onto.template.text


def _way(spec: AdapterSpec) -> str:
    """Returns ``cat`` or ``linear``; raises MappingError ``adapter-setting`` for what is no merge."""
    way = spec.settings.get("combination_type", "cat")
    if way in ("cat", "linear"):
        return way
    reason = f": it {_REFUSED[way]}" if way in _REFUSED else ""
    raise MappingError(
        "adapter-setting",
        f"adapters are not merged by combination_type {way}{reason}",
        where=str(spec.mark),
        expected="cat, the sum of the adapters, or linear",
        hint="write `combination_type: cat`; or merge each adapter into the base, and the models by `op: ties` or "
        "`op: dare`",
    )


def _combined(specs: Sequence[AdapterSpec], catalogs: Mapping[str, Catalog], read: ReadSideFile) -> AdapterJob:
    """Returns one adapter for several, of the first one's rank, at a scale of 1."""
    members = []
    for spec in specs:
        catalog = catalogs[spec.source.source]
        settings = read_adapter_settings(spec, catalog, read)
        parts = sort_adapter(spec, catalog)
        _refuse_more_than_pairs(spec, parts, settings)
        members.append((parts, settings))
    first = specs[0]
    rank = next(entry.shape[0] for held in members[0][0].modules.values() for entry in held.values())
    entries: dict[str, TensorEntry] = {}
    for module in dict.fromkeys(module for parts, _ in members for module in parts.modules):
        made = _sums(module, [(parts.modules[module], one) for parts, one in members if module in parts.modules], rank)
        for name, entry in made:
            full = first.source.template.format({"rest": f"{PREFIX}{module}.{name}"})
            entries[full] = replace(entry, name=full, source=first.source.source)
    files = {name: one for name, one in catalogs[first.source.source].side_files.items() if name != ADAPTER_CONFIG}
    catalog = replace(catalogs[first.source.source], entries=entries, aliases={}, absent=frozenset(), side_files=files)
    said = {"alpha": str(rank), **({"fan_in_fan_out": "true"} if members[0][1].config.fan_in_fan_out else {})}
    used = {(spec.source.source, name) for spec, (parts, _) in zip(specs, members, strict=True) for name in parts.used}
    return AdapterJob(replace(first, settings=said), catalog, also=frozenset(used))


def _sums(
    module: str, members: Sequence[tuple[Mapping[str, TensorEntry], AdapterSettings]], first_rank: int
) -> Iterator[tuple[str, TensorEntry]]:
    """Yields the sums of A and of B: each adapter's scale is on both by its root, its sign on A, as in peft."""
    pair = next((pair for pair in _PAIRS if pair[0] in members[0][0]), None)
    if pair is None or any(part not in held for held, _ in members for part in pair):
        raise MappingError("adapter-incomplete", f"{module} has no pair of factors in every adapter")
    shapes = {tuple(held[part].shape for part in pair) for held, _ in members}
    if len(shapes) > 1:
        raise MappingError(
            "adapter-rank",
            f"{module}: combination_type linear adds A to A, and these have other shapes",
            found=listed([str([list(shape) for shape in pair]) for pair in shapes]),
            hint="write `combination_type: cat`, which needs no common rank",
        )
    rank = members[0][0][pair[0]].shape[0]
    scales = [settings.scale(module, rank) for _, settings in members]
    roots = [sqrt(abs(scale)) for scale in scales]
    signed = [copysign(root, scale) * rank / first_rank for root, scale in zip(roots, scales, strict=True)]
    for part, name, weights in zip(pair, _PAIRS[pair], (signed, roots), strict=True):
        yield name, compose(Linear(tuple(weights)), [held[part] for held, _ in members])


def _refuse_more_than_pairs(spec: AdapterSpec, parts: AdapterTensors, settings: AdapterSettings) -> None:
    others = {part for held in parts.modules.values() for part in held} - {part for pair in _PAIRS for part in pair}
    what = "rsLoRA, of which peft makes another scale" if settings.config.rslora else ""
    what = listed(sorted(others)) if others else what
    what = "modules that were trained whole" if parts.trained else what
    if what or not parts.modules or settings.config.init or settings.config.parameters:
        raise MappingError(
            "adapter-setting",
            f"{spec.source.source} cannot be combined by combination_type linear: {what or 'it is no plain LoRA'}",
            where=str(spec.mark),
            expected="adapters of A and B alone",
            hint="write `combination_type: cat`, which adds what each adapter makes of its own",
        )
