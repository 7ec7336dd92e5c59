"""A conversion without a mapping file that keeps every name: one source, one rule, the source's own side files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.mapping.same_names import keep_names
from shardmerge.mapping.spec import SourceSpec
from shardmerge.plan.planner import make_plan
from shardmerge.prepare.agreed import agreed
from shardmerge.prepare.dequantizing import dequantized
from shardmerge.prepare.moments import moments_of
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.needs import needs_of_cast
from shardmerge.prepare.options import Options, Prepared, file_choice, output_settings
from shardmerge.prepare.plain_advice import better_roads, nothing_to_convert, refuse_parts
from shardmerge.prepare.publishable import Conditions
from shardmerge.prepare.side_files import SideFiles
from shardmerge.prepare.unwrapping import without_wrapper
from shardmerge.targets.beside import with_side_files
from shardmerge.targets.plain import PLAIN, expect_same


def prepare_plain(source: SourceSpec, options: Options) -> Prepared:
    """Plans a conversion that keeps every name."""
    name = source.name
    opened = open_source(source, Path(), options)
    refuse_parts(source, opened)
    sides = SideFiles()
    output = output_settings(None, options)
    opened, outside = without_wrapper(opened, sides)
    settled = dequantized({name: opened}, needs_of_cast(name, opened, output.dtype), sides.read)
    catalog = settled.catalogs[name]
    expectation = replace(expect_same(catalog, sides.read, output.dtype), warnings=better_roads(catalog))
    expectation = with_side_files(expectation, sides.read, file_choice(None, options), "--files")
    resolution = keep_names(name, catalog, {*settled.dropped, *((name, one) for one in outside)})
    if not resolution.assignments:
        raise nothing_to_convert(source, catalog)
    told = settled.told({name: catalog}, catalog.entries.values())
    moments = moments_of(source, opened, resolution, options)
    plan = make_plan(PLAIN, told, {name: source.path}, resolution, expectation, output, moments)
    conditions = Conditions(partial=options.partial, source=catalog)
    return Prepared.of(sides.pinned(agreed(plan, sides, conditions, options)), None, options)
