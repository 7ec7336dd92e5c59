"""`init`: a checkpoint and its bases opened, what they are, and the base that an adapter names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from shardmerge.prepare.beside_config import read_config
from shardmerge.prepare.inspection import inspect
from shardmerge.prepare.side_files import SideFiles
from shardmerge.recognition.proposal import Found, Proposal, propose
from shardmerge.recognition.recognised import recognise
from shardmerge.storage.listing import without_links
from shardmerge.targets.config_numbers import load_object
from shardmerge.tensors import Catalog
from shardmerge.tensors.file_roles import ADAPTER_CONFIG


def proposed(checkpoint: str, bases: Mapping[str, str], to: str, folder: Path, *, download: bool) -> Proposal:
    """Returns a mapping that will lie in ``folder``, to which its paths are relative."""
    found = partial(_found, folder=folder, download=download)
    own = found(checkpoint)
    named = {name: found(path) for name, path in bases.items()}
    base = _base_name(own.catalog)
    places = (Path(base).expanduser(), Path(own.catalog.path) / base) if base else ()
    place = next((str(one) for one in places if one.is_dir()), None)
    own = replace(own, base_name=base, base=found(place) if place else None)
    return propose(own, named, to)


def _found(path: str, *, folder: Path, download: bool) -> Found:
    catalog = inspect(path, download=download)
    return Found(relative(path, folder), catalog, recognise(catalog, read_config(catalog, SideFiles().read)))


def _base_name(catalog: Catalog) -> str:
    """Returns what an adapter's config calls its base; ``""`` without such a config."""
    extent = catalog.side_files.get(ADAPTER_CONFIG)
    name = load_object(extent, SideFiles().read).get("base_model_name_or_path") if extent is not None else None
    return name if isinstance(name, str) else ""


def relative(path: str, folder: Path) -> str:
    """A path as it reads from a folder; absolute ones and hub ids stay."""
    place = Path(path).expanduser()
    return os.path.relpath(place, without_links(folder)) if place.exists() and not place.is_absolute() else path
