"""The config.json beside a checkpoint."""

from __future__ import annotations

from shardmerge.targets.config_numbers import JsonObject, readable_object
from shardmerge.tensors import Catalog, ReadSideFile, SideFile
from shardmerge.tensors.file_roles import CONFIG


def read_config(catalog: Catalog, read: ReadSideFile) -> JsonObject | None:
    """Returns the config.json beside a checkpoint, or None where there is none that says anything."""
    extent = catalog.side_files.get(CONFIG)
    return readable_object(SideFile(CONFIG, (extent,)), read) if extent is not None else None
