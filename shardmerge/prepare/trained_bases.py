"""Bases that the mapping does not name: those that a training config names, and the one that a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.adapters.held import held_base
from shardmerge.errors import UsageError
from shardmerge.mapping.spec import SourceSpec, Spec
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.prepare.adapter_sources import without_wrappers
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options
from shardmerge.prepare.side_files import SideFiles
from shardmerge.sources.hub import is_hub_id, locate
from shardmerge.storage.listing import without_links
from shardmerge.tensors import Catalog, of_source
from shardmerge.tensors.file_roles import CONFIG

# Stands for the place in a file where a training config names a source.
TRAINING_CONFIG = Mark("training config", 1, 1)

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
        found = SourceSpec(name, str(place or path), mark=TRAINING_CONFIG)
        sources[name] = found
        note = f"not in the mapping: taken from the training config, which names {path!r}"
        catalog = open_source(found, folder, options)
        catalogs[name] = replace(catalog, warnings=(note, *catalog.warnings))
    return replace(spec, sources=sources), catalogs


def with_own_base(
    spec: Spec, preset: Preset, catalogs: dict[str, Catalog], sides: SideFiles
) -> tuple[Spec, Preset, dict[str, Catalog]]:
    """Adds as the base of a preset's adapter its own checkpoint, where that is not named and the checkpoint holds it.

    Their names are without wrappers' words then: see ``without_wrappers``.
    A checkpoint that is its own base and has no config.json becomes weights alone: there is nothing to be whole by.
    """
    catalogs = without_wrappers(preset, catalogs, sides)
    for adapter in preset.adapters:
        source, onto = adapter.source.source, adapter.onto.source
        run = catalogs.get(source)
        if run is None or not preset.roles[onto].required:
            continue
        own = onto in catalogs and catalogs[onto].path == run.path
        if not own and (onto in spec.sources or held_base(run, adapter.onto.template) is None):
            continue
        words: tuple[str, ...] = ()
        if onto not in catalogs:
            words += (f"not named: the checkpoint of {source} holds it",)
        base = catalogs.get(onto, replace(run, entries={n: of_source(e, onto) for n, e in run.entries.items()}))
        if CONFIG not in base.side_files and held_base(base, adapter.onto.template) is not None:
            words += ("there is no config.json: the weights alone are written, without one and without a tokenizer",)
            preset = replace(preset, target=None)
        catalogs = {**catalogs, onto: replace(base, warnings=(*words, *base.warnings))}
        sources = {**spec.sources, onto: replace(spec.sources[source], name=onto)} if onto not in spec.sources else {}
        spec = replace(spec, sources=sources or spec.sources)
    return spec, preset, catalogs


def _find_base(text: str, folder: Path, trained: Path) -> Path | None:
    """Looks where the training run may have meant: beside the mapping, beside the run, here, in the hub cache."""
    for place in (folder, *trained.parents[:4], Path()):
        if (place / text).exists():
            return without_links(place / text)
    try:
        return locate(text) if is_hub_id(text) else None
    except UsageError:
        return None
