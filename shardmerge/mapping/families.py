"""Whether a preset's source is of the families that the preset is for.

A preset with a target leaves that to the target, which reads the config. The others make a bare state dict for another
tool: Granite and OLMo have the names of a LLaMA, and would be loaded as one there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardmerge.errors import TargetError
from shardmerge.mapping.preset_files import Preset
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import load_object
from shardmerge.tensors import Catalog, ReadSideFile


def odd_families(preset: Preset, catalogs: Mapping[str, Catalog], read: ReadSideFile) -> Iterator[TargetError]:
    """Yields an error for each source whose config.json names a ``model_type`` that the preset is not for."""
    for role, about in preset.roles.items():
        extent = catalogs[role].side_files.get("config.json") if role in catalogs else None
        if not about.model_types or extent is None:
            continue
        stated = load_object(extent, read).get("model_type")
        if stated not in about.model_types:
            yield TargetError(
                "unsupported-architecture",
                f"the preset {preset.name} does not support this architecture",
                where=extent.file,
                found=f"model_type {shown(stated)}",
                expected=f"model_type {' or '.join(about.model_types)}",
            )
