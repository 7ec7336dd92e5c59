"""Names of a wrapped model, brought back to those that its config.json has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardmerge.mapping.near import listed
from shardmerge.prepare.beside_config import read_config
from shardmerge.prepare.side_files import SideFiles
from shardmerge.recognition.recognised import recognise
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors import Catalog
from shardmerge.tensors.wrapped_names import stripped


def without_wrapper(catalog: Catalog, sides: SideFiles) -> tuple[Catalog, tuple[str, ...]]:
    """Takes wrappers' prefixes off the names where config.json tells the model's own; and what is not the model's."""
    words, outside = wrapper_of(catalog, read_config(catalog, sides.read))
    if not words:
        return catalog, ()
    names = {name: stripped(name, words) for name in catalog.names() if name not in frozenset(outside)}
    return unwrapped(catalog, names, words, outside), outside


def wrapper_of(catalog: Catalog, config: JsonObject | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the prefixes of wrappers that a config.json has not, in order; and the names beside the wrapped model."""
    found = recognise(catalog, config) if config is not None else None
    return (found.wrappers, found.outside) if found is not None and found.wrappers else ((), ())


def unwrapped(catalog: Catalog, names: Mapping[str, str], words: Sequence[str], outside: Sequence[str]) -> Catalog:
    """Returns a catalog with other names, and says which prefixes are taken off, and what is left out."""
    said = ", ".join(f"`{prefix}`" for prefix in words)
    left = f"; left out: {listed(list(outside), 3)}" if outside else ""
    warning = f"the names are those of a wrapped model: {said} is taken off, as config.json has them without{left}"
    return replace(renamed(catalog, names), warnings=(*catalog.warnings, warning))


def renamed(catalog: Catalog, names: Mapping[str, str]) -> Catalog:
    """Returns a catalog with its tensors called as ``names`` says, without those that it does not name."""
    entries = {names[name]: replace(one, name=names[name]) for name, one in catalog.entries.items() if name in names}
    aliases = {names[one]: names[own] for one, own in catalog.aliases.items() if one in names and own in names}
    told = catalog.optimizer.renamed(names) if catalog.optimizer is not None else None
    absent = frozenset(names.get(name, name) for name in catalog.absent)
    return replace(catalog, entries=entries, aliases=aliases, absent=absent, optimizer=told)
