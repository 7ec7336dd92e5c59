"""A mapping becomes a plan: opens its sources, fills in what the training config knows, resolves its rules."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.conversion import PLAIN, Options, Prepared, file_choice, open_source, output_options, read_side_file
from shardmerge.dtypes import DType
from shardmerge.errors import MappingError, ShardmergeError, UsageError, raise_all
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.reader import load_spec
from shardmerge.mapping.resolution import Resolution
from shardmerge.mapping.resolve import resolve
from shardmerge.mapping.spec import OutputSpec, SourceSpec, Spec, TargetSpec
from shardmerge.mapping.variables import Variables, unused_variables
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.planner import make_plan
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.opening import locate
from shardmerge.targets.beside import with_side_files
from shardmerge.targets.expectation import Expectation, FileChoice, Request, Target
from shardmerge.tensors import Catalog

# What only some mappings need is imported where they need it.
if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset


def prepare_mapping(path: Path, options: Options) -> Prepared:
    """Plans a mapping.yaml. Relative paths in it are relative to its own directory."""
    spec = load_spec(path)
    return prepare(spec, path.resolve().parent, options)


def prepare(spec: Spec, folder: Path, options: Options) -> Prepared:
    """Plans a spec whose relative paths are relative to ``folder``.

    Raises
    ------
    ShardmergeError
        Everything that is wrong with a stage (sources, target, mapping) at once, before a data byte is read.
    """
    preset = _preset(spec.use) if spec.use else None
    own = {name for name in spec.variables if preset is None or name not in preset.variables}
    if preset is not None:
        spec = replace(spec, sources={name: _as_role(one, preset) for name, one in spec.sources.items()})
    catalogs = _open_all(spec, folder, options)
    if spec.target is not None:
        raise_all(_odd_roles(spec.target, catalogs))
    if preset is not None:
        spec, catalogs = _filled_in(spec, preset, catalogs, folder, options)
        spec = _combined(spec, preset, catalogs)
    raise_all([*unused_variables(spec, own), *_idle_vocabulary(spec), *_idle_files(spec, options)])
    output = output_options(spec.output, options)
    merged, used = _merged(spec, catalogs)
    variables = Variables(catalogs, read_side_file, spec.variables)
    expectation = _expectation(spec, catalogs, output.dtype, variables)
    files = file_choice(spec.output, options)
    if expectation is not None:
        expectation = with_side_files(expectation, read_side_file, files, output.where)
    resolution = resolve(
        spec.rules,
        spec.drops,
        merged,
        expectation,
        user_file=spec.file,
        variables=variables,
        merged=used,
    )
    plan = make_plan(
        spec.target.name if spec.target else PLAIN,
        merged,
        {name: source.path for name, source in spec.sources.items()},
        resolution,
        expectation or _as_resolved(resolution),
        output,
    )
    return Prepared(plan, _output_path(spec.output, folder))


def _preset(name: str) -> Preset:
    from shardmerge.mapping.preset_files import load_preset

    return load_preset(name)


def _combined(spec: Spec, preset: Preset, catalogs: Mapping[str, Catalog]) -> Spec:
    from shardmerge.mapping.layouts import odd_layouts
    from shardmerge.mapping.preset_files import combine

    raise_all(odd_layouts(spec, preset, catalogs))
    return combine(spec, preset)


def _merged(spec: Spec, catalogs: dict[str, Catalog]) -> tuple[dict[str, Catalog], frozenset[tuple[str, str]]]:
    """Returns the catalogs with all adapters merged into their bases, and the tensors that are so used up."""
    if not spec.adapters:
        return catalogs, frozenset()
    from shardmerge.mapping.adapters import merge_adapters

    merged = merge_adapters(spec.adapters, catalogs, read_side_file)
    return merged.catalogs, merged.used


def _as_role(source: SourceSpec, preset: Preset) -> SourceSpec:
    role = preset.roles.get(source.name)
    if role is None or source.strip:
        return source
    return replace(source, strip=role.strip, strip_required=False)


def _output_path(spec: OutputSpec | None, folder: Path) -> Path | None:
    """``..`` goes by text, as the user reads the path, not by what links point to."""
    return Path(os.path.normpath(folder / Path(spec.path).expanduser())) if spec else None


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
        catalogs[name] = replace(catalog, notes=(note, *catalog.notes))
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


def _expectation(
    spec: Spec, catalogs: Mapping[str, Catalog], dtype: DType | None, variables: Variables
) -> Expectation | None:
    if spec.target is None:
        return None
    target = _target(spec.target)
    texts = spec.target.roles
    return target.expect(
        Request(
            roles={role: source for role, source in texts.items() if role in target.roles},
            options={key: _option(value, variables) for key, value in texts.items() if key in target.options},
            catalogs=catalogs,
            read=read_side_file,
            dtype=dtype,
            vocabulary=spec.vocabulary,
            where=str(spec.target.mark),
        )
    )


def _idle_vocabulary(spec: Spec) -> Iterator[ShardmergeError]:
    """Without a target nobody knows which tensors have the vocabulary's rows, and nothing would be resized."""
    if spec.vocabulary is not None and spec.target is None:
        yield MappingError(
            "no-target",
            "`vocabulary` is for a target, and the mapping has none",
            where=spec.file,
            hint="add `target: {name: hf/llama, text: SOURCE}`, or the op `new_rows` for single tensors",
        )


def _idle_files(spec: Spec, options: Options) -> Iterator[ShardmergeError]:
    """Without a target nothing but tensors is written."""
    if spec.target is None and file_choice(spec.output, options) not in (None, FileChoice("none")):
        yield MappingError(
            "no-target",
            "`files` says what lies beside a target's weights, and the mapping has no target",
            where=spec.file,
            hint="add `target: {name: hf/model, text: SOURCE}`, which takes the files of that source along",
        )


def _option(text: str, variables: Variables) -> str:
    """An option of a target may be a number of ``let:``, by its name."""
    return str(variables.get(text)) if text in variables.variables else text


def _target(spec: TargetSpec) -> Target:
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
    target = _target(spec)
    known = (*target.roles, *target.options)
    for key, value in spec.roles.items():
        if key not in known:
            hint = did_you_mean(key, known)
            yield UsageError("unknown-role", f"{spec.name} has no role {key!r}", where=str(spec.mark), hint=hint)
        elif key in target.roles and value not in catalogs:
            hint = did_you_mean(value, catalogs)
            yield UsageError("unknown-source", f"there is no source {value!r}", where=str(spec.mark), hint=hint)


def _as_resolved(resolution: Resolution) -> Expectation:
    return Expectation({name: assignment.entry.shape for name, assignment in resolution.assignments.items()})
