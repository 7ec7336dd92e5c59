"""Names of the sources of a preset with an adapter: without wrappers' words, and with peft's prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shardmerge.adapters.roots import PREFIX
from shardmerge.prepare.side_files import SideFiles
from shardmerge.prepare.unwrapping import renamed, without_wrapper
from shardmerge.recognition.recognised import recognise
from shardmerge.tensors import Catalog
from shardmerge.tensors.wrapped_names import ANYWHERE, without

if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset

# The target that is an adapter.
_ADAPTER = "peft/adapter"


def without_wrappers(preset: Preset, catalogs: dict[str, Catalog], sides: SideFiles) -> dict[str, Catalog]:
    """Takes wrappers' words out of the bases of a preset's adapters, and out of a run whose adapter is exported.

    config.json tells those of a base; of an adapter's names peft knows none of torch's. Those of a run that was saved
    from the model inside of peft's get its prefix.
    """
    onto = {one.onto.source for one in preset.adapters if preset.roles[one.onto.source].required} & set(catalogs)
    found = {name: without_wrapper(catalogs[name], sides)[0] for name in onto if not _is_run(catalogs[name])}
    source = preset.target.roles.get("trained", "") if preset.target and preset.target.name == _ADAPTER else ""
    if source in catalogs:
        run = catalogs[source]
        front = _front(run, preset.name)
        note = (f"`{front}` is put in front of every name, where peft has it",) if front else ()
        names = {name: front + _plain(name) for name in (*run.names(), *run.absent)}
        if len(set(names.values())) == len(names) and any(name != clean for name, clean in names.items()):
            found[source] = replace(renamed(run, names), notes=(*run.notes, *note))
    return catalogs | found


def _front(run: Catalog, preset: str) -> str:
    """Returns peft's prefix for an adapter that a preset reads and whose names are without it."""
    if any(PREFIX in name for name in run.names()) or not _is_run(run):
        return ""
    reads = any(road.preset == preset for layout in recognise(run).layouts for road in layout.roads)
    return PREFIX if reads else ""


def _is_run(catalog: Catalog) -> bool:
    return any(".lora_" in name for name in catalog.names())


def _plain(name: str) -> str:
    for word in ANYWHERE:
        name = without(name, word)
    return name
