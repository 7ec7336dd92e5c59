"""Several adapters as one, as ``add_weighted_adapter`` of peft 0.21 makes them: ``cat`` and ``linear``. Pure.

``cat`` puts the factors behind each other, the scales on A: its product is the sum of the products, whatever the ranks.
Its rank is the sum of all, and a module that some do not have is filled with zeros. ``linear`` adds A to A and B to B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import copysign, sqrt

from shardmerge.adapters.parts import AdapterTensors, sort_adapter
from shardmerge.adapters.refusals import refuse_no_adapter
from shardmerge.adapters.roots import PREFIX
from shardmerge.adapters.settings import AdapterSettings, read_adapter_settings
from shardmerge.compose import cast_to, compose
from shardmerge.errors import MappingError
from shardmerge.mapping.near import listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.ops.fill import Fill
from shardmerge.ops.joining import Concat
from shardmerge.ops.pointwise import Linear
from shardmerge.tensors import PEFT_ADAPTER, Catalog, ReadSideFile, TensorEntry
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


_Member = tuple[Mapping[str, TensorEntry], AdapterSettings]


@dataclass(frozen=True, slots=True)
class Combined:
    """One adapter made of several, at a scale of 1.

    Attributes
    ----------
    catalog
        Its tensors, as ``save_pretrained`` names them; what its config says stands in ``facts``.
    rank
        As adapter_config.json has it, ``lora_alpha`` as well.
    fan_in_fan_out
        That of the first one.
    used
        (source, name) of what it was made of.
    """

    catalog: Catalog
    rank: int
    fan_in_fan_out: bool
    used: frozenset[tuple[str, str]]


def onto_adapters(
    specs: Sequence[AdapterSpec], catalogs: Mapping[str, Catalog], read: ReadSideFile
) -> tuple[list[AdapterSpec], dict[str, Catalog], frozenset[tuple[str, str]]]:
    """Returns what is left to be merged, once adapters that go onto an adapter are combined with it.

    An adapter that is named as ``onto`` alone counts once; named as ``from`` too, it has a ``weight:``. The last of the
    three are (source, name) of tensors that are part of another source's adapter now.

    Raises
    ------
    MappingError
        Those of ``combined``; ``adapter-setting``: two ways of combining at once.
    """
    found, used = dict(catalogs), set[tuple[str, str]]()
    groups: dict[str, list[AdapterSpec]] = {}
    left: list[AdapterSpec] = []
    for spec in specs:
        (groups.setdefault(spec.onto.source, []) if _is_onto_adapter(spec, catalogs) else left).append(spec)
    for onto, group in groups.items():
        itself = replace(group[0], source=group[0].onto, settings={})
        members = group if any(spec.source.source == onto for spec in group) else [itself, *group]
        made = combined(members, _one_way(group), catalogs, read)
        found[onto] = made.catalog
        used |= {(source, name) for source, name in made.used if source != onto}
    return left, found, frozenset(used)


def _is_onto_adapter(spec: AdapterSpec, catalogs: Mapping[str, Catalog]) -> bool:
    there = spec.source.source in catalogs and spec.onto.source in catalogs
    return there and catalogs[spec.onto.source].kind == PEFT_ADAPTER


def _one_way(specs: Sequence[AdapterSpec]) -> str:
    ways = {way_of(spec): spec for spec in specs}
    if len(ways) > 1:
        raise MappingError(
            "adapter-setting",
            "adapters are combined by one combination_type, and these lines have two",
            where=str(specs[-1].mark),
            found=" and ".join(ways),
            hint="write the same `combination_type:` in each line",
        )
    return next(iter(ways))


def way_of(spec: AdapterSpec) -> str:
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


def combined(specs: Sequence[AdapterSpec], way: str, catalogs: Mapping[str, Catalog], read: ReadSideFile) -> Combined:
    """Returns one adapter for several.

    Raises
    ------
    MappingError
        ``adapter-setting``: more than pairs of A and B. ``adapter-rank``: ``linear`` of unequal shapes.
        ``not-an-adapter``, ``adapter-incomplete``, ``unknown-alpha`` and those of reading the adapters.
    """
    members = []
    for spec in specs:
        catalog = catalogs[spec.source.source]
        settings = read_adapter_settings(spec, catalog, read)
        parts = sort_adapter(spec, catalog)
        if not parts.modules:
            refuse_no_adapter(spec, catalog, parts)
        _refuse_more_than_pairs(spec, parts, settings, way)
        members.append((parts, settings))
    ranks = [max(_ranks(parts)) for parts, _ in members]
    rank = sum(ranks) if way == "cat" else ranks[0]
    first, source = catalogs[specs[0].source.source], specs[0].source.source
    entries: dict[str, TensorEntry] = {}
    for module in dict.fromkeys(module for parts, _ in members for module in parts.modules):
        held = [(parts.modules[module], one) for parts, one in members if module in parts.modules]
        for name, entry in (_joined if way == "cat" else _sums)(module, held, rank):
            full = f"{PREFIX}{module}.{name}"
            entries[full] = replace(entry, name=full, source=source, origin=f"{way} of {len(held)} adapters")
    turned = members[0][1].config.fan_in_fan_out
    files = {name: one for name, one in first.side_files.items() if name != ADAPTER_CONFIG}
    facts = {"lora_r": rank, "lora_alpha": rank, "lora_fan_in_fan_out": turned}
    catalog = replace(first, entries=entries, aliases={}, absent=frozenset(), side_files=files, facts=facts)
    used = {(spec.source.source, name) for spec, (parts, _) in zip(specs, members, strict=True) for name in parts.used}
    return Combined(catalog, rank, turned, frozenset(used))


def _ranks(parts: AdapterTensors) -> Iterator[int]:
    every = (held.get("a", held.get("embedding_a")) for held in parts.modules.values())
    return (a.shape[0] for a in every if a is not None and a.shape)


def _joined(module: str, members: Sequence[_Member], rank: int) -> Iterator[tuple[str, TensorEntry]]:
    """Yields A ``[rank, in]`` with each adapter's scale on it, and B ``[out, rank]``, in the first one's type."""
    pair = _pair(module, members)
    first = members[0][0]
    for part, name, axis in zip(pair, _PAIRS[pair], (0, 1), strict=True):
        made = [held[part] for held, _ in members]
        if axis == 0:
            scales = [settings.scale(module, held[part].shape[0]) for held, settings in members]
            made = [compose(Linear((scale,), "scale"), [one]) for scale, one in zip(scales, made, strict=True)]
        made = [cast_to(one, first[part].dtype) for one in made]
        if lacking := rank - sum(one.shape[axis] for one in made):
            shape = tuple(lacking if number == axis else size for number, size in enumerate(made[0].shape))
            made.append(compose(Fill(shape, first[part].dtype, 0.0), []))
        yield name, compose(Concat(axis), made)


def _pair(module: str, members: Sequence[_Member]) -> tuple[str, str]:
    pair = next((pair for pair in _PAIRS if pair[0] in members[0][0]), None)
    if pair is None or any(part not in held for held, _ in members for part in pair):
        raise MappingError("adapter-incomplete", f"{module} has no pair of factors in every adapter")
    return pair


def _sums(module: str, members: Sequence[_Member], first_rank: int) -> Iterator[tuple[str, TensorEntry]]:
    """Yields the sums of A and of B: each adapter's scale is on both by its root, its sign on A, as in peft."""
    pair = _pair(module, members)
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


def _refuse_more_than_pairs(spec: AdapterSpec, parts: AdapterTensors, settings: AdapterSettings, way: str) -> None:
    others = {part for held in parts.modules.values() for part in held} - {part for pair in _PAIRS for part in pair}
    what = "rsLoRA, of which peft makes another scale" if settings.config.rslora and way == "linear" else ""
    what = listed(sorted(others)) if others else what
    what = "modules that were trained whole" if parts.trained else what
    if what or not parts.modules or settings.config.init or settings.config.parameters:
        raise MappingError(
            "adapter-setting",
            f"{spec.source.source} cannot be combined by combination_type {way}: {what or 'it is no plain LoRA'}",
            where=str(spec.mark),
            expected="adapters of A and B alone",
            hint="name the model as `onto`, with `combination_type: cat`, the sum of what each makes of its own",
        )
