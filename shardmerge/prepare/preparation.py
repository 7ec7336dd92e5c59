"""A mapping becomes a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shardmerge.mapping.spec import OutputSpec, Spec
from shardmerge.plan.moments import NO_MOMENTS, Moments
from shardmerge.plan.planner import make_plan
from shardmerge.plan.value import Plan
from shardmerge.prepare.agreed import agreed
from shardmerge.prepare.options import Options, Prepared, output_settings
from shardmerge.prepare.publishable import Conditions
from shardmerge.prepare.resolved import Resolved, resolved
from shardmerge.storage.listing import without_links
from shardmerge.targets.plain import PLAIN
from shardmerge.tensors import Catalog

# The target whose names and shapes are as the rules make them: counts follow from the rules.
_ANY_MODEL = "hf/model"


def prepare_mapping(path: Path, options: Options) -> Prepared:
    """Plans a mapping.yaml. Relative paths in it are relative to its own directory."""
    from shardmerge.mapping.reader import load_spec  # a conversion reads no mapping

    spec = load_spec(path)
    return prepare(spec, without_links(path).parent, options)


def prepare(spec: Spec, folder: Path, options: Options, known: Mapping[str, Catalog] | None = None) -> Prepared:
    """Plans a spec whose relative paths are relative to ``folder``; sources that are ``known`` are open already.

    Raises
    ------
    ShardmergeError
        Everything that is wrong with a stage (sources, target, mapping) at once, before a data byte is read.
    """
    return prepared_of(look_at(spec, folder, options, known), folder, options)


def look_at(spec: Spec, folder: Path, options: Options, known: Mapping[str, Catalog] | None = None) -> Resolved:
    """Returns what a spec comes to, short of a plan; raises as ``prepare``."""
    if _with_moments(spec, options):
        from shardmerge.prepare.moments import keeping_names

        keeping_names(spec)
    return resolved(spec, folder, options, known)


def prepared_of(found: Resolved, folder: Path, options: Options) -> Prepared:
    """Returns the plan of a resolved spec, and where its result goes."""
    return Prepared.of(plan_of(found, folder, options), _output_path(found.spec.output, folder), options)


def plan_of(found: Resolved, folder: Path, options: Options) -> Plan:
    """Returns the plan of a resolved mapping whose relative paths are relative to ``folder``."""
    spec = found.spec
    plan = make_plan(
        spec.target.name if spec.target else PLAIN,
        {name: _whole(found.opened[name], catalog) for name, catalog in found.merged.items()},
        {name: source.path for name, source in spec.sources.items()},
        found.resolution,
        found.expectation,
        output_settings(spec.output, options),
        _moments(found, folder, options),
    )
    conditions = _conditions(spec, found.opened, options)
    return found.sides.pinned(agreed(plan, found.sides, conditions, options))


def _moments(found: Resolved, folder: Path, options: Options) -> Moments:
    if not _with_moments(found.spec, options):
        return NO_MOMENTS
    from shardmerge.prepare.moments import moments_of

    return moments_of(found, folder, options)


def _with_moments(spec: Spec, options: Options) -> bool:
    return options.optimizer or (spec.output is not None and spec.output.optimizer)


def _conditions(spec: Spec, catalogs: Mapping[str, Catalog], options: Options) -> Conditions:
    """Returns what the mapping says of the directory beside its tensors."""
    target = spec.target.name if spec.target is not None else ""
    free = target == _ANY_MODEL
    name = spec.target.roles.get("text", "text") if spec.target is not None else ""
    return Conditions(
        partial=options.partial or (spec.output is not None and spec.output.partial),
        edits=spec.config,
        counts=free or bool(spec.config.take),
        source=catalogs.get(name) if target in (_ANY_MODEL, PLAIN) else None,
        editable=not spec.from_options,
    )


def _whole(opened: Catalog, left: Catalog) -> Catalog:
    """Returns a source for the plan: with all that it holds, and with what was noted on the way."""
    return replace(left, entries=opened.entries, aliases=opened.aliases, absent=opened.absent)


def _output_path(spec: OutputSpec | None, folder: Path) -> Path | None:
    """``..`` goes by text, as the user reads the path, not by what links point to."""
    return Path(os.path.normpath(folder / Path(spec.path).expanduser())) if spec else None
