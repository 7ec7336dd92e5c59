"""What a checkpoint holds, as text and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from shardmerge.errors import plain
from shardmerge.json_rows import JSON_SCHEMA, Fields, Rows
from shardmerge.plan.catalog_tree import human_count, tree_lines
from shardmerge.plan.tables import TextTable, human_bytes
from shardmerge.tensors import Catalog, TensorEntry

# Tied names that the tree tells of.
_MOST_TIED = 8


def catalog_json(catalog: Catalog, layout: str, names: Sequence[str]) -> Fields:
    """Returns a catalog as JSON; ``tensors`` lists name, dtype (as in safetensors), shape and nbytes of some names."""
    wanted = set(names)
    return Fields(
        {
            "schema": JSON_SCHEMA,
            "kind": catalog.kind,
            "layout": layout,
            "path": catalog.path,
            "fingerprint": catalog.fingerprint(),
            "parameters": _parameters(_owners(catalog, names)),
            "tensors": Rows(lambda: (_entry_row(name, catalog[name]) for name in names)),
            "aliases": {name: owner for name, owner in catalog.aliases.items() if name in wanted},
            "absent": sorted(catalog.absent),
            "notes": list(catalog.notes),
            "warnings": list(catalog.warnings),
            "files": [{"path": stamp.path, "nbytes": stamp.size} for stamp in catalog.files],
        }
    )


def _entry_row(name: str, entry: TensorEntry) -> dict[str, object]:
    return {"name": name, "dtype": entry.dtype.name, "shape": list(entry.shape), "nbytes": entry.nbytes}


def catalog_text(catalog: Catalog, layout: str, names: Sequence[str], width: int = 0) -> str:
    """Returns a catalog for people: what it is, how large, and its tensors as a tree of name patterns.

    Parameters
    ----------
    catalog, layout
        What was read, and what its layout is called.
    names
        Of the tensors to show.
    width
        Of the terminal, in columns; 0 for as wide as it needs.
    """
    owners = _owners(catalog, names)
    tied = [f"{name}: tied to {catalog.aliases[name]}" for name in names if name in catalog.aliases]
    if len(tied) > _MOST_TIED:
        tied[_MOST_TIED:] = [f"... and {len(tied) - _MOST_TIED} more tied names: --flat lists them"]
    return "\n".join([*_head(catalog, layout, names), *tree_lines(owners.items(), width), *tied])


def catalog_table(catalog: Catalog, layout: str, names: Sequence[str]) -> str:
    """Returns a catalog with a line for every tensor: name, type, shape, bytes, where it lies."""
    rows = []
    for name in names:
        entry = catalog[name]
        owner = catalog.aliases.get(name)
        where = f"tied to {owner}" if owner else entry.origin
        rows.append((name, entry.dtype.name, str(list(entry.shape)), human_bytes(entry.nbytes), where))
    table = TextTable(("tensor", "dtype", "shape", "bytes", "found in"), rows)
    return "\n".join([*_head(catalog, layout, names), str(table)])


def _head(catalog: Catalog, layout: str, names: Sequence[str]) -> Iterator[str]:
    owners = _owners(catalog, names)
    every = len(catalog.entries) + len(catalog.aliases)
    count = f"{len(owners)} tensors" if len(names) == every else f"{len(owners)} of {len(catalog.entries)} tensors"
    tied = f", {len(names) - len(owners)} tied" if len(names) > len(owners) else ""
    sizes = f"{human_count(_parameters(owners))} parameters, {human_bytes(sum(one.nbytes for one in owners.values()))}"
    yield f"{catalog.kind}: {count}{tied}, {sizes}"
    if layout:
        yield f"layout: {plain(layout)}"
    yield from (f"warning: {plain(text)}" for text in catalog.warnings)
    yield from (f"note: {plain(note)}" for note in catalog.notes)
    yield ""


def _owners(catalog: Catalog, names: Iterable[str]) -> dict[str, TensorEntry]:
    """Returns the tensors that are no second name of another."""
    return {name: catalog.entries[name] for name in names if name in catalog.entries}


def _parameters(owners: dict[str, TensorEntry]) -> int:
    return sum(entry.numel for entry in owners.values())
