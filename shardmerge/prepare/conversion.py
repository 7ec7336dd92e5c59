"""A conversion without a mapping file: the mapping that is written for it.

Every name stays as it is: one source, one rule, the source's own side files. With a preset it is the preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardmerge.mapping.same_names import same_name
from shardmerge.mapping.spec import COMMAND_LINE, SourceSpec, Spec, TargetSpec
from shardmerge.prepare.beside_config import read_config
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options, Prepared
from shardmerge.prepare.plain_advice import better_roads, nothing_to_convert, refuse_parts
from shardmerge.prepare.preparation import look_at, prepared_of
from shardmerge.prepare.resolved import Resolved
from shardmerge.prepare.side_files import SideFiles
from shardmerge.prepare.unwrapping import wrapper_of
from shardmerge.targets.plain import PLAIN
from shardmerge.tensors import Catalog


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

    def looked_at(self, options: Options) -> Resolved:
        """Returns what it comes to."""
        return look_at(self.spec, Path(), options, self.known)

    def prepared(self, found: Resolved, options: Options) -> Prepared:
        """Returns its plan."""
        made = prepared_of(found, Path(), options)
        plan = made.plan
        return replace(made, plan=replace(plan, warnings=(*plan.warnings, *self.advice))) if self.advice else made


def same_names(source: SourceSpec, config: str, options: Options) -> WrittenMapping:
    """Returns the mapping that keeps every name, but for the prefixes of wrappers, which config.json has not.

    ``config`` is where config.json and the files beside it come from; empty for the source itself.
    """
    catalog = open_source(source, Path(), options)
    refuse_parts(source, catalog)
    if not catalog.entries:
        raise nothing_to_convert(source, catalog)
    target = TargetSpec(PLAIN, {"text": source.name}, COMMAND_LINE)
    spec = Spec(COMMAND_LINE.file, {source.name: source}, None, "", target, (same_name(source.name),), ())
    known: dict[str, Catalog] = {}
    beside = catalog
    if config:
        from shardmerge.prepare.config_elsewhere import SOURCE, with_config

        spec, beside = with_config(spec, config, options)
        known[SOURCE] = beside
    words, outside = wrapper_of(catalog, read_config(beside, SideFiles().read))
    if words:
        from shardmerge.prepare.wrapped_source import without_words

        spec, catalog = without_words(spec, source, catalog, words, outside)
    advice = better_roads(replace(catalog, side_files=beside.side_files))
    return WrittenMapping(spec, {source.name: catalog, **known}, advice)
