"""The config.json beside a checkpoint."""

from __future__ import annotations

import json

from shardmerge.targets.config_numbers import MAX_JSON_BYTES, JsonObject
from shardmerge.tensors import Catalog, ReadSideFile, SideFile
from shardmerge.tensors.file_roles import CONFIG


def read_config(catalog: Catalog, read: ReadSideFile) -> JsonObject | None:
    """Returns the config.json beside a checkpoint, or None where there is none that says anything."""
    extent = catalog.side_files.get(CONFIG)
    return parsed(SideFile(CONFIG, (extent,)), read) if extent is not None else None


def parsed(side: SideFile, read: ReadSideFile) -> JsonObject | None:
    """Returns a config, or None for a file that says nothing that could be compared."""
    if side.nbytes > MAX_JSON_BYTES:
        return None
    try:
        value = json.loads(side.content(read))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
