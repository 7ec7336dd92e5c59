"""``--config``: config.json, tokenizer and the files beside them of another directory, whose weights are not wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.errors import UsageError
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.spec import COMMAND_LINE, Drop, SourceSpec, Spec
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options
from shardmerge.tensors import Catalog
from shardmerge.tensors.file_roles import CONFIG

# What the mapping calls it.
SOURCE = "config"


def with_config(spec: Spec, path: str, options: Options) -> tuple[Spec, Catalog]:
    """Returns a mapping whose target takes its files from another directory or hub id; and what lies there.

    Raises
    ------
    UsageError
        ``missing-config``: there is no config.json. Else as ``open_source``.
    """
    place = Path(path).expanduser()
    if place.is_file() or (place.is_dir() and not (place / CONFIG).exists()):
        raise _missing(place)
    source = SourceSpec(SOURCE, path, mark=COMMAND_LINE)
    catalog = open_source(source, Path(), options)
    if CONFIG not in catalog.side_files:
        raise _missing(place)
    every = Template.parse("{rest...}")
    drops = (Drop(SOURCE, every, COMMAND_LINE),) if catalog.entries or catalog.absent else ()
    target = replace(spec.target, roles={"text": SOURCE}) if spec.target is not None else None
    return replace(spec, sources={**spec.sources, SOURCE: source}, target=target, drops=drops), catalog


def _missing(place: Path) -> UsageError:
    found = [one for one in (place.parent, *sorted(place.glob("*/"))) if (one / CONFIG).is_file()]
    what = "--config takes a directory with a config.json, or a hub id"
    hint = f"--config {found[0]}" if found else "name the directory of the model that the training began with"
    return UsageError("missing-config", what, where=str(place), found="a file" if place.is_file() else "", hint=hint)
