"""The source of a conversion that holds a wrapped model: the mapping says which prefixes go, and what stands beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardmerge.mapping.pattern import Template
from shardmerge.mapping.spec import COMMAND_LINE, Drop, SourceSpec, Spec
from shardmerge.mapping.suggest import drop_templates
from shardmerge.prepare.named_source import check_apart
from shardmerge.prepare.unwrapping import unwrapped
from shardmerge.tensors import Catalog
from shardmerge.tensors.wrapped_names import stripped


def without_words(
    spec: Spec, source: SourceSpec, catalog: Catalog, words: Sequence[str], outside: Sequence[str]
) -> tuple[Spec, Catalog]:
    """Returns a mapping that strips words off a source's names and drops what is outside, and the catalog so named."""
    names = {name: stripped(name, words) for name in catalog.names()}
    check_apart(names, source)
    beside = {names[name] for name in outside}
    templates = drop_templates(sorted(beside), set(names.values()) - beside)
    drops = tuple(Drop(source.name, Template.parse(text), COMMAND_LINE) for text in templates)
    named = replace(source, strip=(*source.strip, *words))
    spec = replace(spec, sources={**spec.sources, source.name: named}, drops=(*spec.drops, *drops))
    return spec, unwrapped(catalog, names, words, outside)
