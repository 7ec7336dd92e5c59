"""Which preset reads a checkpoint: the one whose rules find most of its names. Recipes are data: they can tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from shardmerge.errors import MappingError
from shardmerge.mapping.near import listed
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.spec import Spec, references
from shardmerge.tensors import Catalog

if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset

# Layers repeat: a few hundred names, taken evenly, tell the layout of a model with 100,000.
_MOST_NAMES = 400

# Below this share of its names, a source is not what the preset was written for. Two layouts share a norm or a head.
_STRANGER = 0.1
_WELL_KNOWN = 0.9

# Names that need a preset to become a Hugging Face model; all others may be what the user wants as they are. Each with
# a part of the names of every layer: a preset takes 20 ms to read, which a checkpoint without them need not wait for.
FOREIGN = {
    "llama/meta-to-hf": ".attention.wq.",
    "llama/megatron-to-hf": ".self_attention.linear_qkv.",
    "llama/megatron-dist-to-hf": ".self_attention.linear_qkv.",
    "llama/megatron-dist-to-hf-qwen3-moe": ".mlp.router.",
    "llama/torchtune-to-hf": ".attn.output_proj.",
    "llama/litgpt-to-hf": "transformer.h.",
    "clip/open-clip-to-hf": ".attn.in_proj_weight",
}


@dataclass(frozen=True, slots=True)
class _Fit:
    """How well a preset reads a source: the share of its names, and how many of the preset's templates found one."""

    share: float
    templates: int


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
        if names and _fit(templates, names).share < _STRANGER:
            yield _another_layout(preset, role, catalogs[role], templates)


def foreign_presets(catalog: Catalog) -> tuple[str, ...]:
    """Returns the presets that would turn a checkpoint of another tool into a Hugging Face model."""
    near = [name for name, part in FOREIGN.items() if any(part in tensor for tensor in catalog.names())]
    return _best(catalog, [name for name in near if name in _roads(catalog)]) if near else ()


def _roads(catalog: Catalog) -> dict[str, str]:
    """Returns the presets that lead away from a layout that the checkpoint has, each with the role that it plays there.

    A preset that takes ``model.{rest...}`` reads the names of many models, and makes sense of those of its layout only.
    """
    from shardmerge.mapping.guess import recognise

    return {road.preset: road.role for layout in recognise(catalog) for road in layout.roads}


def _another_layout(preset: Preset, role: str, catalog: Catalog, templates: Sequence[Template]) -> MappingError:
    found = _fits(catalog, [name for name, plays in _roads(catalog).items() if name != preset.name and not plays])
    hint = " or ".join(f"`{name}`" for name in list(found)[:3])
    return MappingError(
        "another-layout",
        f"`{role}` has not the names that the preset {preset.name} reads: {preset.roles[role].about}",
        where=catalog.path,
        found=f"names such as {listed(list(islice(catalog.names(), 3)), 3)}",
        expected=f"names such as {listed([template.text for template in templates[:3]], 3)}",
        hint=f"these names are read by {hint}"
        if hint
        else "no preset reads these names: write `tensors:` yourself, or leave `use` out to keep them as they are",
    )


def _best(catalog: Catalog, presets: Sequence[str]) -> tuple[str, ...]:
    """Returns the presets that read nearly all names, and of those the ones that know them best."""
    fits = _fits(catalog, presets)
    most = max((fit.templates for fit in fits.values()), default=0)
    return tuple(name for name, fit in fits.items() if fit.templates * 5 >= most * 4)


def _fits(catalog: Catalog, presets: Sequence[str]) -> dict[str, _Fit]:
    """Returns the presets that read nearly all names."""
    fits: dict[str, _Fit] = {}
    for name in presets:
        from shardmerge.mapping.preset_files import load_preset

        preset = load_preset(name)
        role = next(role for role, about in preset.roles.items() if about.required)
        names = _sample(catalog, preset, role)
        fit = _fit(_templates(preset, role), names)
        if names and fit.share >= _WELL_KNOWN:
            fits[name] = fit
    return fits


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


def common_prefix(names: Iterable[str], prefixes: Sequence[str]) -> str:
    """Returns the first of some prefixes that every name has, ``""`` for none."""
    every = list(names)
    return next((one for one in prefixes if every and all(name.startswith(one) for name in every)), "")


def _fit(templates: Sequence[Template], names: Sequence[str]) -> _Fit:
    known = [{index for index, one in enumerate(templates) if one.match(name) is not None} for name in names]
    return _Fit(sum(map(bool, known)) / max(len(names), 1), len(set().union(*known)) if known else 0)
