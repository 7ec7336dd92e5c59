"""A mapping with its sources opened: the preset combined with it, bases found that the training config names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.errors import ShardmergeError, UsageError, raise_all
from shardmerge.mapping.spec import SourceSpec, Spec
from shardmerge.mapping.variables import unused_variables
from shardmerge.plan.planner import OutputSettings
from shardmerge.prepare.mapping_checks import idle_files, idle_sources, odd_roles
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options, file_choice, output_settings
from shardmerge.prepare.side_files import SideFiles
from shardmerge.targets.expectation import FileChoice
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


def open_mapping(spec: Spec, folder: Path, options: Options, known: Mapping[str, Catalog]) -> Opened:
    """Opens the sources of a spec whose relative paths are relative to ``folder``; headers are read, no data.

    Those that are ``known`` are open already.

    Raises
    ------
    ShardmergeError
        Everything that is wrong with the sources, or with what the mapping says of them, at once.
    """
    preset = _preset(spec.use) if spec.use else None
    own, sides = set(spec.variables), SideFiles()
    if preset is not None:
        spec = replace(spec, sources={name: _as_role(one, preset) for name, one in spec.sources.items()})
    catalogs = {**known, **_open_all([one for one in spec.sources.values() if one.name not in known], folder, options)}
    if spec.target is not None:
        raise_all(odd_roles(spec.target, catalogs))
    if preset is not None:
        from shardmerge.prepare.trained_bases import filled_in, with_own_base

        spec, catalogs = filled_in(spec, preset, catalogs, folder, options)
        spec, preset, catalogs = with_own_base(spec, preset, catalogs, sides)
        spec = _combined(spec, preset, catalogs, sides)
    spec = _named(spec, catalogs, sides)
    raise_all([*unused_variables(spec, own), *idle_sources(spec, preset, catalogs), *idle_files(spec, options)])
    return Opened(spec, catalogs, output_settings(spec.output, options), file_choice(spec.output, options), sides)


def _preset(name: str) -> Preset:
    from shardmerge.mapping.preset_files import load_preset

    return load_preset(name)


def _combined(spec: Spec, preset: Preset, catalogs: Mapping[str, Catalog], sides: SideFiles) -> Spec:
    from shardmerge.mapping.families import odd_families
    from shardmerge.mapping.preset_files import with_preset
    from shardmerge.recognition.other_layouts import odd_layouts

    raise_all(odd_layouts(spec, preset, catalogs))
    raise_all(odd_families(preset, catalogs, sides.read))
    return with_preset(spec, preset)


def _named(spec: Spec, catalogs: Mapping[str, Catalog], sides: SideFiles) -> Spec:
    if spec.target is None or spec.target.name != "hf/names":
        return spec
    from shardmerge.mapping.generation_rules import with_generation

    return with_generation(spec, spec.target, catalogs, sides.read)


def _as_role(source: SourceSpec, preset: Preset) -> SourceSpec:
    role = preset.roles.get(source.name)
    if role is None or source.strip:
        return source
    return replace(source, usual=role.strip)


def _open_all(sources: Sequence[SourceSpec], folder: Path, options: Options) -> dict[str, Catalog]:
    catalogs: dict[str, Catalog] = {}
    problems: list[ShardmergeError] = []
    for source in sources:
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
