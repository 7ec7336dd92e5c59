"""A source as the mapping names it: opened, its prefix taken off, every entry marked with its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.errors import MappingError
from shardmerge.mapping.layouts import common_prefix
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.spec import SourceSpec
from shardmerge.prepare.options import Options
from shardmerge.prepare.shard_counts import settled
from shardmerge.sources.deepspeed_files import VIEWS
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.opening import open_catalog
from shardmerge.tensors import Catalog, of_source


def open_source(source: SourceSpec, folder: Path, options: Options) -> Catalog:
    """Returns the catalog of a source whose relative path is relative to ``folder``."""
    view = next((view for view in VIEWS if view == source.view), VIEWS[0])
    opening = OpenOptions(view=view, root=source.root, download=options.download)
    catalog = settled(open_catalog(_located(source.path, folder), opening))
    return _marked(_stripped(catalog, source), source.name)


def _marked(catalog: Catalog, name: str) -> Catalog:
    """Marks every entry once, instead of a copy of it for each use."""
    return replace(catalog, entries={key: of_source(entry, name) for key, entry in catalog.entries.items()})


def _stripped(catalog: Catalog, source: SourceSpec) -> Catalog:
    """Takes a prefix off all names. One that a preset expects may be absent; one of the user's must be there."""
    without = [name for name in catalog.names() if not name.startswith(source.strip)]
    if source.strip and (without or not catalog.entries):
        raise _odd_strip(source, without)
    prefix = source.strip or common_prefix(catalog.names(), source.usual)
    if not prefix:
        return catalog
    entries = {
        name.removeprefix(prefix): replace(entry, name=name.removeprefix(prefix))
        for name, entry in catalog.entries.items()
    }
    aliases = {alias.removeprefix(prefix): owner.removeprefix(prefix) for alias, owner in catalog.aliases.items()}
    absent = frozenset(name.removeprefix(prefix) for name in catalog.absent)
    notes = (*catalog.notes, f"`{prefix}` is taken off every name")
    names = {name: name.removeprefix(prefix) for name in catalog.names()}
    told = catalog.optimizer.renamed(names) if catalog.optimizer is not None else None
    return replace(catalog, entries=entries, aliases=aliases, absent=absent, notes=notes, optimizer=told)


def _odd_strip(source: SourceSpec, without: list[str]) -> MappingError:
    return MappingError(
        "strip-matches-nothing",
        f"not every name of {source.name} begins with {source.strip!r}, which `strip` takes off",
        where=str(source.mark),
        found=f"{count(len(without), 'name')} without it: {listed(without, 3)}" if without else "no tensors at all",
        hint="leave `strip` out, and write the prefix into the rules of the names that have it",
    )


def _located(text: str, folder: Path) -> Path | str:
    """A path relative to the mapping if there is something, a hub id if it reads like one."""
    path = folder / Path(text).expanduser()
    return text if is_hub_id(text) and not path.exists() else path
