"""Drops against catalogs: which tensors are gone, and by which line.

What is dropped is taken out of the catalogs before anything looks at them: rules, operands of ops, ``{e*}``, adapters
that are merged. So no road leads to a dropped tensor, whoever looks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardmerge.mapping.spec import Drop
from shardmerge.tensors import Catalog, TensorEntry


@dataclass(frozen=True, slots=True)
class Dropped:
    """What drops come to.

    Attributes
    ----------
    lines
        (source, name) of every tensor that is gone, with the first line that says so.
    idle
        The user's own drops that match nothing.
    """

    lines: Mapping[tuple[str, str], Drop]
    idle: tuple[Drop, ...] = ()

    def left(self, catalogs: Mapping[str, Catalog]) -> dict[str, Catalog]:
        """Returns the catalogs without what is dropped."""
        gone: dict[str, set[str]] = {}
        for source, name in self.lines:
            gone.setdefault(source, set()).add(name)
        return {name: without(catalog, gone[name]) if name in gone else catalog for name, catalog in catalogs.items()}

    def said(self, source: str, name: str) -> str:
        """Returns that a tensor is dropped, and by which line; ``""`` if it is not."""
        drop = self.lines.get((source, name))
        return f"dropped by `{drop.source}:{drop.template}` at {drop.mark}" if drop is not None else ""


def find_dropped(drops: Sequence[Drop], catalogs: Mapping[str, Catalog]) -> Dropped:
    """Returns what the drops of a mapping take away from its sources. Sources that are not there are passed over."""
    lines: dict[tuple[str, str], Drop] = {}
    idle = []
    for drop in drops:
        if drop.source not in catalogs:
            continue
        catalog = catalogs[drop.source]
        names = [name for name in (*catalog.names(), *catalog.absent) if drop.template.match(name) is not None]
        for name in names:
            lines.setdefault((drop.source, name), drop)
        if not names and not drop.optional:
            idle.append(drop)
    return Dropped(lines, tuple(idle))


def without(catalog: Catalog, gone: set[str]) -> Catalog:
    """Returns a catalog without some names. A tied tensor that loses its own name goes on under its next one."""
    entries: dict[str, TensorEntry] = {name: entry for name, entry in catalog.entries.items() if name not in gone}
    heirs: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for alias, owner in catalog.aliases.items():
        if alias in gone:
            continue
        if owner in entries or owner in heirs:
            aliases[alias] = heirs.get(owner, owner)
        elif owner in catalog.entries:
            heirs[owner] = alias
            entries[alias] = replace(catalog.entries[owner], name=alias)
    return replace(catalog, entries=entries, aliases=aliases, absent=catalog.absent - gone)
