"""Who needs numbers of quantized sources, and what for: a cast, an op, an adapter, a target."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from shardmerge.mapping.spec import Drop, OpTerm, Reference, Rule, Spec, dequantized_by, references
from shardmerge.targets.quantization_config import QUANTIZATION_FILES
from shardmerge.tensors import Catalog
from shardmerge.tensors.file_roles import CONFIG
from shardmerge.tensors.packed import fp8_weights


@dataclass(frozen=True, slots=True)
class Needs:
    """What a mapping does with quantized sources.

    Attributes
    ----------
    purposes
        Why a source must be numbers, by its name: ``the cast to BF16``.
    published
        Sources whose config.json goes into the output.
    by_rule
        (source, name) of the weights that rules of the mapping dequantize themselves.
    dropped
        (source, name) of the scales that the mapping drops.
    """

    purposes: Mapping[str, str] = field(default_factory=dict)
    published: frozenset[str] = frozenset()
    by_rule: frozenset[tuple[str, str]] = frozenset()
    dropped: frozenset[tuple[str, str]] = frozenset()


def says_codes(catalog: Catalog) -> bool:
    """Tells whether a file beside a checkpoint may say that its weights are codes."""
    return not {CONFIG, *QUANTIZATION_FILES}.isdisjoint(catalog.side_files)


def needs_of(spec: Spec, catalogs: Mapping[str, Catalog], cast: str, published: Collection[str], closed: str) -> Needs:
    """Returns which sources of a mapping must be numbers, and why.

    Parameters
    ----------
    cast
        The type that output tensors are cast to, ``""`` where each keeps its own.
    published
        Sources whose config.json goes into the output.
    closed
        The target, where it takes no codes, else ``""``.
    """
    weights = {name: fp8_weights(catalog) for name, catalog in catalogs.items()}
    purposes: dict[str, str] = {}
    if cast or closed:
        purposes = dict.fromkeys(catalogs, f"the cast to {cast}" if cast else f"the target {closed}")
    for adapter in (one for one in spec.adapters if one.source.source in catalogs):
        purposes.setdefault(adapter.onto.source, f"the adapter {adapter.source.source}")
    for reference, kind in _of_ops(spec.rules):
        codes = weights.get(reference.source, ())
        if reference.source not in purposes and any(reference.template.match(name) is not None for name in codes):
            purposes[reference.source] = f"the op {kind}"
    users = {reference.source for rule in spec.rules for term in rule.candidates for reference in references(term)}
    for name in weights if published else ():
        if len(users & set(catalogs)) > 1:
            purposes.setdefault(name, "one config.json for tensors of several sources")
        if spec.vocabulary is not None:
            purposes.setdefault(name, "the vocabulary")
    return Needs(
        purposes,
        frozenset(published),
        frozenset(_by_rule(spec.rules, weights)),
        frozenset(_dropped_scales(spec.drops, catalogs)),
    )


def _dropped_scales(drops: Collection[Drop], catalogs: Mapping[str, Catalog]) -> Iterator[tuple[str, str]]:
    for drop in drops:
        for name in catalogs[drop.source].names() if drop.source in catalogs else ():
            if "scale" in name.rpartition(".")[2] and drop.template.match(name) is not None:
                yield drop.source, name


def _of_ops(rules: Collection[Rule]) -> Iterator[tuple[Reference, str]]:
    for rule in rules:
        for term in rule.candidates:
            if isinstance(term, OpTerm):
                yield from ((reference, term.kind.name) for reference in references(term))


def _by_rule(rules: Collection[Rule], weights: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    for rule in rules:
        for reference in (one for term in rule.candidates for one in dequantized_by(term)):
            for name in weights.get(reference.source, ()):
                if reference.template.match(name) is not None:
                    yield reference.source, name
