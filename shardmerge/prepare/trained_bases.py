"""The pretrained models that a training config names and the mapping does not: looked for, and opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.errors import UsageError
from shardmerge.mapping.spec import SourceSpec, Spec
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.opening import locate
from shardmerge.tensors import Catalog

if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset


def filled_in(
    spec: Spec, preset: Preset, catalogs: dict[str, Catalog], folder: Path, options: Options
) -> tuple[Spec, dict[str, Catalog]]:
    """Adds the base models that the training config names and the user left out, if they are to be found here."""
    roles = preset.target.roles if preset.target else {}
    trained = catalogs.get(roles.get("trained", ""))
    if trained is None or not trained.training_config:
        return spec, catalogs
    from shardmerge.targets.training_config import read_training_config

    facts = read_training_config(trained.training_config)
    sources = dict(spec.sources)
    for role, path in (("text", facts.llm_path), ("vision", facts.vision_path)):
        name = roles.get(role, "")
        if not name or name in sources or not path:
            continue
        place = _find_base(path, folder, Path(trained.path))
        if place is None and not (options.download and is_hub_id(path)):
            continue
        found = SourceSpec(name, str(place or path), mark=Mark("training config", 1, 1))
        sources[name] = found
        note = f"not in the mapping: taken from the training config, which names {path!r}"
        catalog = open_source(found, folder, options)
        catalogs[name] = replace(catalog, warnings=(note, *catalog.warnings))
    return replace(spec, sources=sources), catalogs


def _find_base(text: str, folder: Path, trained: Path) -> Path | None:
    """Looks where the training run may have meant: beside the mapping, beside the run, here, in the hub cache."""
    for place in (folder, *trained.parents[:4], Path()):
        if (place / text).exists():
            return (place / text).resolve()
    try:
        return locate(text) if is_hub_id(text) else None
    except UsageError:
        return None
