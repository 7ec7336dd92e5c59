"""What a checkpoint holds. Apart from the rest of the public door, since it needs no arrays, plans or mappings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardmerge.errors import UsageError
from shardmerge.prepare.shard_counts import settled
from shardmerge.shown import inspecting
from shardmerge.sources.deepspeed_files import DeepSpeedView
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.opening import open_catalog
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Catalog, Extent


def layout_of(catalog: Catalog) -> str:
    """Returns what a checkpoint is, by its names, shapes and config.json, for people; ``""`` where nothing is known."""
    from shardmerge.prepare.beside_config import read_config
    from shardmerge.recognition.recognised import recognise

    return recognise(catalog, read_config(catalog, _content)).title


def _content(extent: Extent) -> bytes:
    with SourceFile(Path(extent.file)) as file:
        return file.read(extent.offset, extent.nbytes)


def inspect(source: str | Path, *, view: DeepSpeedView = "fp32", root: str = "", download: bool = False) -> Catalog:
    """Returns what a checkpoint holds, from its headers alone.

    Parameters
    ----------
    source
        A file, a directory, or a hub id in the local cache (``org/name`` or ``org/name@revision``).
    view
        Of a DeepSpeed checkpoint: ``fp32`` master weights, or the 16-bit ``module``.
    root
        Dotted path of the state dict inside a torch file; empty to find it.
    download
        Whether a hub id may be downloaded.

    Raises
    ------
    UsageError, CheckpointError
        Nothing there, or nothing that can be read.
    """
    return settled(open_catalog(source, OpenOptions(view=view, root=root, download=download)))


def matching(catalog: Catalog, templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of a checkpoint that one of the templates matches, in its order; without a template, all.

    Parameters
    ----------
    catalog
        The checkpoint.
    templates
        As a mapping writes them: ``model.layers.{i}.mlp.{rest...}``.

    Raises
    ------
    MappingError
        A template that is none, as in a mapping.
    UsageError
        ``unknown-tensor``: one that matches nothing.
    """
    return names_matching(tuple(catalog.names()), templates, catalog.path)


def names_matching(names: Sequence[str], templates: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns those of some names that one of the templates matches, as ``matching`` does; ``where`` holds them."""
    if not templates:
        return tuple(names)
    from shardmerge.mapping.pattern import Template

    parsed = [Template.parse(text) for text in templates]
    found = [{name for name in names if one.match(name) is not None} for one in parsed]
    for template, own in zip(templates, found, strict=True):
        if not own:
            raise _matches_nothing(template, names, where)
    return tuple(name for name in names if any(name in own for own in found))


def _matches_nothing(template: str, names: Sequence[str], where: str) -> UsageError:
    from shardmerge.mapping.near import NameIndex, listed

    below = any(name.startswith(f"{template}.") for name in names)
    near = NameIndex(names).near(template)
    hint = f"leave it out: {inspecting(where)} lists the names"
    if below:
        hint = f"a template matches whole names; `{template}.{{rest...}}` matches those below it"
    elif near:
        hint = f"near names: {listed(near)}"
    return UsageError("unknown-tensor", f"no tensor is called {template!r}", where=where, hint=hint)
