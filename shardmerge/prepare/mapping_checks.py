"""What a mapping says that cannot be, or does nothing, told once its sources are open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from shardmerge.errors import MappingError, ShardmergeError, UsageError
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.spec import Spec, TargetSpec, references
from shardmerge.mapping.variables import ROOMS, formula_names
from shardmerge.prepare.options import Options, file_choice
from shardmerge.targets.expectation import FileChoice, Target
from shardmerge.tensors import Catalog

if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset


def idle_sources(spec: Spec, preset: Preset | None, catalogs: Mapping[str, Catalog]) -> Iterator[ShardmergeError]:
    """Yields an error for a source without tensors that nothing asks for its config either; others show by tensors."""
    named = set(spec.target.roles.values() if spec.target else ()) | set(preset.roles if preset else ())
    named |= {one.source for rule in spec.rules for term in rule.candidates for one in references(term)}
    named |= {end.source for one in spec.adapters for end in (one.source, one.onto)}
    asked = {name.partition(".")[0] for name in formula_names(spec)}
    for name, catalog in catalogs.items():
        if not (catalog.entries or catalog.absent) and name not in named | asked and not asked & set(ROOMS):
            what, where = f"nothing uses the source `{name}`", str(spec.sources[name].mark)
            yield MappingError("unknown-source", what, where=where, hint="remove it, or name it in a rule")


def idle_files(spec: Spec, options: Options) -> Iterator[ShardmergeError]:
    """Yields an error for a choice of files without a target: nothing but tensors is written."""
    if spec.target is None and file_choice(spec.output, options) not in (None, FileChoice("none")):
        yield MappingError(
            "no-target",
            "`files` says what lies beside a target's weights, and the mapping has no target",
            where=spec.file,
            hint="add `target: {name: hf/model, text: SOURCE}`, which takes the files of that source along",
        )


def target_of(spec: TargetSpec) -> Target:
    """Returns the target that a mapping names, or raises ``unknown-target``."""
    from shardmerge.targets.registry import TARGETS

    if spec.name not in TARGETS:
        hint = did_you_mean(spec.name, TARGETS)
        raise UsageError(
            "unknown-target",
            f"there is no target {spec.name!r}",
            where=str(spec.mark),
            expected=", ".join(TARGETS),
            hint=hint,
        )
    return TARGETS[spec.name]


def odd_roles(spec: TargetSpec, catalogs: Mapping[str, Catalog]) -> Iterator[ShardmergeError]:
    """Yields an error for each role that a target does not have, and for each source that is not there."""
    target = target_of(spec)
    known = (*target.roles, *target.options)
    for key, value in spec.roles.items():
        if key not in known:
            hint = did_you_mean(key, known)
            yield UsageError("unknown-role", f"{spec.name} has no role {key!r}", where=str(spec.mark), hint=hint)
        elif key in target.roles and value not in catalogs:
            hint = did_you_mean(value, catalogs)
            yield UsageError("unknown-source", f"there is no source {value!r}", where=str(spec.mark), hint=hint)
