"""Names of a wrapped model, brought back to those that its config.json has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardmerge.mapping.near import listed
from shardmerge.prepare.beside_config import read_config
from shardmerge.prepare.side_files import SideFiles
from shardmerge.recognition.recognised import recognise
from shardmerge.tensors import Catalog
from shardmerge.tensors.wrapped_names import stripped


def without_wrapper(catalog: Catalog, sides: SideFiles) -> tuple[Catalog, tuple[str, ...]]:
    """Takes wrappers' prefixes off the names where config.json tells the model's own; and what is not the model's."""
    config = read_config(catalog, sides.read)
    found = recognise(catalog, config) if config is not None else None
    if found is None or not found.wrappers:
        return catalog, ()
    outside = frozenset(found.outside)
    names = {name: stripped(name, found.wrappers) for name in catalog.names() if name not in outside}
    words = ", ".join(f"`{prefix}`" for prefix in found.wrappers)
    left = f"; left out: {listed(list(found.outside), 3)}" if outside else ""
    warning = f"the names are those of a wrapped model: {words} is taken off, as config.json has them without{left}"
    return replace(renamed(catalog, names), warnings=(*catalog.warnings, warning)), found.outside


def renamed(catalog: Catalog, names: Mapping[str, str]) -> Catalog:
    """Returns a catalog with its tensors called as ``names`` says, without those that it does not name."""
    entries = {names[name]: replace(one, name=names[name]) for name, one in catalog.entries.items() if name in names}
    aliases = {names[one]: names[own] for one, own in catalog.aliases.items() if one in names and own in names}
    told = catalog.optimizer.renamed(names) if catalog.optimizer is not None else None
    absent = frozenset(names.get(name, name) for name in catalog.absent)
    return replace(catalog, entries=entries, aliases=aliases, absent=absent, optimizer=told)
