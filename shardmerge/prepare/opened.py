"""A mapping with its sources opened: the preset combined with it, bases found that the training config names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.errors import MappingError, ShardmergeError, UsageError, raise_all
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.spec import SourceSpec, Spec, TargetSpec, references
from shardmerge.mapping.variables import ROOMS, formula_names, unused_variables
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.plan.planner import OutputSettings
from shardmerge.prepare.conversion import Options, file_choice, open_source, output_settings
from shardmerge.prepare.side_files import SideFiles
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.opening import locate
from shardmerge.targets.expectation import FileChoice, Target
from shardmerge.tensors import Catalog

if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset


@dataclass(frozen=True, slots=True)
class Opened:
    """A mapping with its preset, and its sources as they are."""

    spec: Spec
    catalogs: dict[str, Catalog]
    output: OutputSettings
    files: FileChoice | None
    sides: SideFiles


def open_mapping(spec: Spec, folder: Path, options: Options) -> Opened:
    """Opens the sources of a spec whose relative paths are relative to ``folder``; headers are read, no data.

    Raises
    ------
    ShardmergeError
        Everything that is wrong with the sources, or with what the mapping says of them, at once.
    """
    preset = _preset(spec.use) if spec.use else None
    own, sides = set(spec.variables), SideFiles()
    if preset is not None:
        spec = replace(spec, sources={name: _as_role(one, preset) for name, one in spec.sources.items()})
    catalogs = _open_all(spec, folder, options)
    if spec.target is not None:
        raise_all(_odd_roles(spec.target, catalogs))
    if preset is not None:
        spec, catalogs = _filled_in(spec, preset, catalogs, folder, options)
        spec = _combined(spec, preset, catalogs, sides)
    raise_all([*unused_variables(spec, own), *_idle_sources(spec, preset, catalogs), *_idle_files(spec, options)])
    return Opened(spec, catalogs, output_settings(spec.output, options), file_choice(spec.output, options), sides)


def _preset(name: str) -> Preset:
    from shardmerge.mapping.preset_files import load_preset

    return load_preset(name)


def _combined(spec: Spec, preset: Preset, catalogs: Mapping[str, Catalog], sides: SideFiles) -> Spec:
    from shardmerge.mapping.families import odd_families
    from shardmerge.mapping.layouts import odd_layouts
    from shardmerge.mapping.preset_files import combine

    raise_all(odd_layouts(spec, preset, catalogs))
    raise_all(odd_families(preset, catalogs, sides.read))
    return combine(spec, preset)


def _as_role(source: SourceSpec, preset: Preset) -> SourceSpec:
    role = preset.roles.get(source.name)
    if role is None or source.strip:
        return source
    return replace(source, strip=role.strip, strip_required=False)


def _open_all(spec: Spec, folder: Path, options: Options) -> dict[str, Catalog]:
    catalogs: dict[str, Catalog] = {}
    problems: list[ShardmergeError] = []
    for source in spec.sources.values():
        try:
            catalogs[source.name] = open_source(source, folder, options)
        except UsageError as error:
            if source.required or error.code not in ("missing-path", "not-in-cache"):
                problems.append(_at(error, source))
        except ShardmergeError as error:
            problems.extend(error.each())
    raise_all(problems)
    return catalogs


def _at(error: UsageError, source: SourceSpec) -> UsageError:
    """Adds the line of the mapping that names the source."""
    where = f"{source.mark} (source '{source.name}')" + (f": {error.where}" if error.where else "")
    return UsageError(error.code, error.what, where=where, found=error.found, expected=error.expected, hint=error.hint)


def _filled_in(
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


def _idle_sources(spec: Spec, preset: Preset | None, catalogs: Mapping[str, Catalog]) -> Iterator[ShardmergeError]:
    """Yields an error for a source without tensors that nothing asks for its config either; others show by tensors."""
    named = set(spec.target.roles.values() if spec.target else ()) | set(preset.roles if preset else ())
    named |= {one.source for rule in spec.rules for term in rule.candidates for one in references(term)}
    named |= {end.source for one in spec.adapters for end in (one.source, one.onto)}
    asked = {name.partition(".")[0] for name in formula_names(spec)}
    for name, catalog in catalogs.items():
        if not (catalog.entries or catalog.absent) and name not in named | asked and not asked & set(ROOMS):
            what, where = f"nothing uses the source `{name}`", str(spec.sources[name].mark)
            yield MappingError("unknown-source", what, where=where, hint="remove it, or name it in a rule")


def _idle_files(spec: Spec, options: Options) -> Iterator[ShardmergeError]:
    """Without a target nothing but tensors is written."""
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


def _odd_roles(spec: TargetSpec, catalogs: Mapping[str, Catalog]) -> Iterator[ShardmergeError]:
    target = target_of(spec)
    known = (*target.roles, *target.options)
    for key, value in spec.roles.items():
        if key not in known:
            hint = did_you_mean(key, known)
            yield UsageError("unknown-role", f"{spec.name} has no role {key!r}", where=str(spec.mark), hint=hint)
        elif key in target.roles and value not in catalogs:
            hint = did_you_mean(value, catalogs)
            yield UsageError("unknown-source", f"there is no source {value!r}", where=str(spec.mark), hint=hint)
