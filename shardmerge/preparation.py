"""A mapping becomes a plan: opens its sources, fills in what the training config knows, resolves its rules."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.conversion import (
    COMMAND_LINE,
    PLAIN,
    Options,
    Prepared,
    file_choice,
    open_source,
    output_options,
)
from shardmerge.dequantizing import Needs, as_plain, dequantized, needs_of
from shardmerge.dtypes import DType
from shardmerge.errors import MappingError, ShardmergeError, UsageError, raise_all
from shardmerge.mapping.codes import leaves_all_codes, odd_company
from shardmerge.mapping.dropping import Dropped, find_dropped
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.reader import load_spec
from shardmerge.mapping.resolution import Resolution
from shardmerge.mapping.resolve import resolve
from shardmerge.mapping.spec import OutputSpec, SourceSpec, Spec, TargetSpec, references
from shardmerge.mapping.variables import ROOMS, Variables, formula_names, unused_variables
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.plan import Plan
from shardmerge.planner import OutputOptions, make_plan
from shardmerge.publishable import Terms, publishable
from shardmerge.side_files import SideFiles
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.opening import locate
from shardmerge.targets.architectures import JsonObject
from shardmerge.targets.beside import with_side_files
from shardmerge.targets.changed_config import changed_reader, with_changes
from shardmerge.targets.expectation import Expectation, FileChoice, Request, Target
from shardmerge.tensors import Catalog, Extent

# The target whose names and shapes are as the rules make them: counts follow from the rules.
_ANY_MODEL = "hf/model"

# What only some mappings need is imported where they need it.
if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset


# What each format calls its files, where a target does not leave that to the user.
_SUFFIXES = {"safetensors": {".safetensors"}, "bin": {".bin", ".pth"}}


def prepare_mapping(path: Path, options: Options) -> Prepared:
    """Plans a mapping.yaml. Relative paths in it are relative to its own directory."""
    spec = load_spec(path)
    return prepare(spec, path.resolve().parent, options)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A mapping with all that it came to, short of a plan.

    Attributes
    ----------
    spec
        Its preset combined with it.
    opened, merged
        The sources as they are, and without what is dropped, adapters merged.
    sides
        The small files that were read for it.
    """

    spec: Spec
    opened: Mapping[str, Catalog]
    merged: Mapping[str, Catalog]
    resolution: Resolution
    expectation: Expectation
    sides: SideFiles


def prepare(spec: Spec, folder: Path, options: Options) -> Prepared:
    """Plans a spec whose relative paths are relative to ``folder``.

    Raises
    ------
    ShardmergeError
        Everything that is wrong with a stage (sources, target, mapping) at once, before a data byte is read.
    """
    found = resolved(spec, folder, options)
    return Prepared(plan_of(found, options), _output_path(spec.output, folder))


def plan_of(found: Resolved, options: Options) -> Plan:
    """Returns the plan of a resolved mapping."""
    spec = found.spec
    plan = make_plan(
        spec.target.name if spec.target else PLAIN,
        {name: _whole(found.opened[name], catalog) for name, catalog in found.merged.items()},
        {name: source.path for name, source in spec.sources.items()},
        found.resolution,
        found.expectation,
        output_options(spec.output, options),
    )
    terms = _terms(spec, found.opened, options)
    return found.sides.pinned(publishable(plan, found.sides.read, terms))


def resolved(spec: Spec, folder: Path, options: Options) -> Resolved:
    """Opens the sources of a mapping and says what every target is made of; raises as ``prepare``."""
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
    output = output_options(spec.output, options)
    dropped = find_dropped(spec.drops, catalogs)
    needs = _needs(spec, catalogs, output)
    settled = dequantized(catalogs, needs, sides.read)
    merged, used, changes = _merged(spec, settled.catalogs, dropped, sides)
    read = changed_reader(changes, sides.read)
    # What adapters change beside weights: the tokenizer, and words of config.json.
    seen = {name: replace(one, side_files=merged[name].side_files) for name, one in settled.catalogs.items()}
    variables = Variables(seen, read, spec.variables)

    def expected(catalogs: Mapping[str, Catalog]) -> Expectation | None:
        made = _expectation(spec, catalogs, dropped, output.dtype, variables)
        if made is None:
            return None
        made = with_side_files(made, read, file_choice(spec.output, options), output.where)
        return with_changes(made, changes, read)

    expectation = expected(seen)
    raise_all(_idle(spec, expectation))
    expectation = _with_format_warning(spec, options, expectation)
    resolution = resolve(
        spec.rules,
        dropped,
        merged,
        expectation,
        user_file=spec.file,
        variables=variables,
        merged=used | settled.used | settled.dropped,
    )
    resolution = replace(resolution, dropped=tuple(sorted({*resolution.dropped, *settled.dropped})))
    for name in needs.published:
        raise_all(odd_company(resolution.assignments, seen, name, settled.skipped[name]))
        catalog = seen[name]
        if expectation and leaves_all_codes(resolution.assignments.values(), name, catalog):
            plain = expected({**seen, name: as_plain(catalog)})
            expectation = replace(plain or expectation, warnings=(*expectation.warnings, _left_out(name, catalog)))
    told = settled.told(merged, (one.entry for one in resolution.assignments.values()))
    return Resolved(spec, catalogs, told, resolution, expectation or _as_resolved(resolution), sides)


def _terms(spec: Spec, catalogs: Mapping[str, Catalog], options: Options) -> Terms:
    """Returns what the mapping says of the directory beside its tensors."""
    free = spec.target is not None and spec.target.name == _ANY_MODEL
    name = spec.target.roles.get("text", "text") if spec.target is not None else ""
    return Terms(
        partial=options.partial or (spec.output is not None and spec.output.partial),
        edits=spec.config,
        counts=free or bool(spec.config.take),
        source=catalogs.get(name) if free else None,
        editable=spec.file != COMMAND_LINE,
    )


def _needs(spec: Spec, catalogs: Mapping[str, Catalog], output: OutputOptions) -> Needs:
    """Quantized sources are copied as they are into a target that takes codes, or where there is none."""
    cast = output.dtype or next((dtype for _, dtype in output.dtypes if dtype is not None), None)
    target = _target(spec.target) if spec.target else None
    closed = target.name if target is not None and not target.codes else ""
    published = {spec.target.roles.get("text", "text")} if spec.target and not closed else set[str]()
    return needs_of(spec, catalogs, str(cast or ""), published & set(catalogs), closed)


def _left_out(name: str, catalog: Catalog) -> str:
    return f"{name}: config.json says {catalog.quantized}, and no tensor is: its quantization_config is left out"


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


def _merged(
    spec: Spec, catalogs: Mapping[str, Catalog], dropped: Dropped, sides: SideFiles
) -> tuple[dict[str, Catalog], frozenset[tuple[str, str]], dict[Extent, JsonObject]]:
    """Returns what is left of the catalogs, all adapters merged into their bases, the tensors so used up, and what the
    bases' config.json have to say otherwise.
    """
    left = dropped.left(catalogs)
    if not spec.adapters:
        return left, frozenset(), {}
    from shardmerge.mapping.adapters import merge_adapters

    try:
        merged = merge_adapters(spec.adapters, left, sides.read)
    except ShardmergeError as error:
        raise_all([_without_dropped_base(one, dropped) for one in error.each()])
        raise
    changes = {catalogs[name].side_files["config.json"]: changed for name, changed in merged.configs.items()}
    return merged.catalogs, merged.used, changes


def _without_dropped_base(error: ShardmergeError, dropped: Dropped) -> ShardmergeError:
    """Says of an adapter whose base tensor is missing that it was dropped."""
    source, _, name = error.expected.partition(":")
    said = dropped.said(source, name)
    if error.code != "adapter-without-base" or not said:
        return error
    hint = "take that line out of `drop`, or drop the adapter's tensors of this module too"
    return MappingError(error.code, error.what, where=error.where, found=f"{error.expected} is {said}", hint=hint)


def _whole(opened: Catalog, left: Catalog) -> Catalog:
    """Returns a source for the plan: with all that it holds, and with what was noted on the way."""
    return replace(left, entries=opened.entries, aliases=opened.aliases, absent=opened.absent)


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


def _expectation(
    spec: Spec, catalogs: Mapping[str, Catalog], dropped: Dropped, dtype: DType | None, variables: Variables
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
            read=variables.read,
            dtype=dtype,
            vocabulary=spec.vocabulary,
            where=str(spec.target.mark),
            dropped=frozenset(pair for pair, drop in dropped.lines.items() if not drop.optional),
        )
    )


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


def _idle(spec: Spec, expectation: Expectation | None) -> Iterator[ShardmergeError]:
    """Yields an error for what is said of the output and has no effect on it."""
    if spec.vocabulary is not None and spec.target is None:
        # Nobody knows which tensors have the vocabulary's rows, and nothing would be resized.
        yield MappingError(
            "no-target",
            "`vocabulary` is for a target, and the mapping has none",
            where=spec.file,
            hint="add `target: {name: hf/llama, text: SOURCE}`, or the op `new_rows` for single tensors",
        )
    if spec.target is None or expectation is None:
        return
    if spec.vocabulary is not None and not expectation.resized:
        what = f"`vocabulary` has no effect: {spec.target.name} has no tensor over the vocabulary"
        yield MappingError("no-effect", what, where=str(spec.target.mark), hint="remove `vocabulary`")


def _with_format_warning(spec: Spec, options: Options, expectation: Expectation | None) -> Expectation | None:
    """Says of a format that the target's own kind of file goes before it: Meta's code reads .pth alone."""
    said = options.format or (spec.output.format if spec.output else None)
    if said is None or expectation is None or spec.target is None:
        return expectation
    suffixes = {group.suffix for group in expectation.groups}
    if "" in suffixes or suffixes & _SUFFIXES[said]:
        return expectation
    text = f"the format `{said}` has no effect: {spec.target.name} always writes {', '.join(sorted(suffixes))}"
    return replace(expectation, warnings=(*expectation.warnings, text))


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
