"""A preset that meets the names of another layout, and names that need a preset to become a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from shardmerge.errors import MappingError
from shardmerge.mapping.near import listed
from shardmerge.mapping.spec import Spec, references
from shardmerge.recognition.recognised import recognise
from shardmerge.tensors import Catalog
from shardmerge.tensors.wrapped_names import common_prefix

if TYPE_CHECKING:
    from shardmerge.mapping.pattern import Template
    from shardmerge.mapping.preset_files import Preset

# Layers repeat: a few hundred names, taken evenly, tell the layout of a model with 100,000.
_MOST_NAMES = 400
# Below this share of its names, a source is not what the preset was written for. Two layouts share a norm or a head.
_STRANGER = 0.1


def odd_layouts(spec: Spec, preset: Preset, catalogs: Mapping[str, Catalog]) -> Iterator[MappingError]:
    """Yields an error for each source that a preset needs and finds next to nothing in.

    Every later message (tensors missing, tensors left over) would only follow from that.
    """
    own = {one.source for rule in spec.rules for term in rule.candidates for one in references(term)}
    own |= {one.source.source for one in spec.adapters}
    for role, about in preset.roles.items():
        templates = _templates(preset, role)
        if not about.required or role in own or role not in catalogs or not templates:
            continue
        names = _sample(catalogs[role], preset, role)
        known = sum(any(one.match(name) is not None for one in templates) for name in names)
        if known < _STRANGER * len(names):
            yield _another_layout(preset, role, catalogs[role], templates)


def foreign_presets(catalog: Catalog) -> tuple[tuple[str, ...], str]:
    """Returns the presets that turn a checkpoint of another tool into another model, a Hugging Face one first.

    And what it is called, if something stands before its names that the first of them does not take off by itself.
    """
    found = recognise(catalog)
    foreign = (one for one in found.layouts if not one.model_types and one.adapter is None)
    roads = tuple(road.preset for layout in foreign for road in layout.open_roads(found.files) if not road.role)
    return roads, found.title if roads and _unknown_wrappers(roads[0], found.wrappers) else ""


def _unknown_wrappers(name: str, wrappers: tuple[str, ...]) -> bool:
    """Tells whether something stands before the names that a preset does not take off by itself."""
    from shardmerge.mapping.preset_files import load_preset

    return bool(wrappers) and not set(wrappers) <= set(next(iter(load_preset(name).roles.values())).strip)


def _another_layout(preset: Preset, role: str, catalog: Catalog, templates: list[Template]) -> MappingError:
    found = recognise(catalog)
    roads = [road.preset for one in found.layouts for road in one.open_roads(found.files) if not road.role]
    hint = " or ".join(f"`{name}`" for name in [one for one in dict.fromkeys(roads) if one != preset.name][:3])
    title = f"{found.title}: " if found.title else ""
    return MappingError(
        "another-layout",
        f"`{role}` does not have the tensor names that the preset {preset.name} reads: {preset.roles[role].about}",
        where=catalog.path,
        found=f"{title}names such as {listed(list(islice(catalog.names(), 3)), 3)}",
        expected=f"names such as {listed([template.text for template in templates[:3]], 3)}",
        hint=f"these names are read by {hint}"
        if hint
        else "no preset reads these names: write `tensors:` yourself, or leave `use` out to keep them as they are",
    )


def _templates(preset: Preset, role: str) -> list[Template]:
    """Returns every template by which a preset looks into a source, drops and what takes everything aside."""
    terms = (one for rule in preset.rules for term in rule.candidates for one in references(term))
    named = [*terms, *(one.source for one in preset.adapters)]
    found = {one.template.text: one.template for one in named if one.source == role}
    return [template for text, template in found.items() if text != "{rest...}"]


def _sample(catalog: Catalog, preset: Preset, role: str) -> list[str]:
    """Returns names, without what the preset drops: Transformer Engine's ``_extra_state`` is half of all names."""
    drops = [drop.template for drop in preset.drops if drop.source == role]
    names = [name for name in catalog.names() if not any(drop.match(name) is not None for drop in drops)]
    prefix = common_prefix(names, preset.roles[role].strip)
    names = [name.removeprefix(prefix) for name in names]
    return names[:: max(1, len(names) // _MOST_NAMES)]
