"""A conversion without a mapping file: the mapping that is written for it.

Every name stays as it is: one source, one rule, the source's own side files. With a preset it is the preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardmerge.mapping.pattern import Template
from shardmerge.mapping.same_names import same_name
from shardmerge.mapping.spec import COMMAND_LINE, Drop, SourceSpec, Spec, TargetSpec
from shardmerge.mapping.suggest import drop_templates
from shardmerge.prepare.beside_config import read_config
from shardmerge.prepare.named_source import check_apart, open_source
from shardmerge.prepare.options import Options, Prepared
from shardmerge.prepare.plain_advice import better_roads, nothing_to_convert, refuse_parts
from shardmerge.prepare.preparation import prepare
from shardmerge.prepare.side_files import SideFiles
from shardmerge.prepare.unwrapping import unwrapped, wrapper_of
from shardmerge.targets.plain import PLAIN
from shardmerge.tensors import Catalog
from shardmerge.tensors.wrapped_names import stripped


@dataclass(frozen=True, slots=True)
class WrittenMapping:
    """A mapping that was written for a conversion.

    Attributes
    ----------
    spec
        The mapping; its relative paths are relative to the current directory.
    known
        Sources that are open already.
    advice
        What the user should know besides.
    """

    spec: Spec
    known: Mapping[str, Catalog] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    def prepared(self, options: Options) -> Prepared:
        """Plans it."""
        found = prepare(self.spec, Path(), options, self.known)
        plan = found.plan
        return replace(found, plan=replace(plan, warnings=(*plan.warnings, *self.advice))) if self.advice else found


def same_names(source: SourceSpec, options: Options) -> WrittenMapping:
    """Returns the mapping that keeps every name, but for the prefixes of wrappers, which config.json has not."""
    catalog = open_source(source, Path(), options)
    refuse_parts(source, catalog)
    if not catalog.entries:
        raise nothing_to_convert(source, catalog)
    words, outside = wrapper_of(catalog, read_config(catalog, SideFiles().read))
    drops: tuple[Drop, ...] = ()
    if words:
        names = {name: stripped(name, words) for name in catalog.names()}
        check_apart(names, source)
        catalog = unwrapped(catalog, names, words, outside)
        source = replace(source, strip=(*source.strip, *words))
        beside = {names[name] for name in outside}
        templates = drop_templates(sorted(beside), set(names.values()) - beside)
        drops = tuple(Drop(source.name, Template.parse(text), COMMAND_LINE) for text in templates)
    target = TargetSpec(PLAIN, {"text": source.name}, COMMAND_LINE)
    rules = (same_name(source.name),)
    spec = Spec(COMMAND_LINE.file, {source.name: source}, None, "", target, rules, drops)
    return WrittenMapping(spec, {source.name: catalog}, better_roads(catalog))
