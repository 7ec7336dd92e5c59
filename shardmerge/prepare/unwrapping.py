"""Names of a wrapped model, brought back to those that its config.json has."""

from __future__ import annotations

from dataclasses import replace

from shardmerge.mapping.near import listed
from shardmerge.prepare.publishable import read_config
from shardmerge.prepare.side_files import SideFiles
from shardmerge.targets.wrappers import unwrapped
from shardmerge.tensors import Catalog


def without_wrapper(catalog: Catalog, sides: SideFiles) -> tuple[Catalog, tuple[str, ...]]:
    """Takes wrappers' prefixes off the names where config.json tells the model's own; and what is not the model's."""
    config = read_config(catalog, sides.read)
    if config is None:
        return catalog, ()
    where = catalog.side_files["config.json"].file
    found = unwrapped(config, {name: catalog[name].shape for name in catalog.names()}, where)
    if not found.prefixes:
        return catalog, ()
    entries = {
        found.names[name]: replace(entry, name=found.names[name])
        for name, entry in catalog.entries.items()
        if name in found.names
    }
    aliases = {
        found.names[alias]: found.names[owner]
        for alias, owner in catalog.aliases.items()
        if alias in found.names and owner in found.names
    }
    words = ", ".join(f"`{prefix}`" for prefix in found.prefixes)
    left = f"; left out: {listed(list(found.outside), 3)}" if found.outside else ""
    warning = f"the names are those of a wrapped model: {words} is taken off, as config.json has them without{left}"
    told = catalog.optimizer.renamed(found.names) if catalog.optimizer is not None else None
    warnings = (*catalog.warnings, warning)
    renamed = replace(catalog, entries=entries, aliases=aliases, warnings=warnings, optimizer=told)
    return renamed, found.outside
