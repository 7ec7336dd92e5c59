"""A mapping becomes a plan: opens its sources, fills in what the training config knows, resolves its rules."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardmerge.dtypes import DType
from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.mapping.codes import leaves_all_codes, odd_company
from shardmerge.mapping.dropping import Dropped, find_dropped
from shardmerge.mapping.reader import load_spec
from shardmerge.mapping.resolution import Resolution
from shardmerge.mapping.resolve import resolve
from shardmerge.mapping.spec import OutputSpec, Spec
from shardmerge.mapping.variables import Variables
from shardmerge.plan.planner import OutputSettings, make_plan
from shardmerge.plan.value import Plan
from shardmerge.prepare.conversion import (
    COMMAND_LINE,
    PLAIN,
    Options,
    Prepared,
    agreed,
    output_settings,
)
from shardmerge.prepare.dequantizing import Dequantized, Needs, as_plain, dequantized, needs_of
from shardmerge.prepare.opened import Opened, open_mapping, target_of
from shardmerge.prepare.publishable import Conditions
from shardmerge.prepare.side_files import SideFiles
from shardmerge.targets.architectures import JsonObject
from shardmerge.targets.beside import with_side_files
from shardmerge.targets.changed_config import changed_reader, with_changes
from shardmerge.targets.expectation import Expectation, Request
from shardmerge.tensors import Catalog, Extent

# The target whose names and shapes are as the rules make them: counts follow from the rules.
_ANY_MODEL = "hf/model"

# What only some mappings need is imported where they need it.


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
        output_settings(spec.output, options),
    )
    terms = _terms(spec, found.opened, options)
    return found.sides.pinned(agreed(plan, found.sides, terms, options))


def resolved(spec: Spec, folder: Path, options: Options) -> Resolved:
    """Opens the sources of a mapping and says what every target is made of; raises as ``prepare``."""
    opened = open_mapping(spec, folder, options)
    ready = _ready(opened)
    expectation = ready.expected(ready.beside)
    raise_all(_idle(opened.spec, expectation))
    expectation = _with_format_warning(opened.spec, options, expectation)
    resolution = resolve(
        opened.spec.rules,
        ready.dropped,
        ready.merged,
        expectation,
        user_file=opened.spec.file,
        variables=ready.variables,
        merged=ready.used | ready.settled.used | ready.settled.dropped,
    )
    resolution = replace(resolution, dropped=tuple(sorted({*resolution.dropped, *ready.settled.dropped})))
    expectation = _codes_agree(ready, resolution, expectation)
    told = ready.settled.told(ready.merged, (one.entry for one in resolution.assignments.values()))
    whole = expectation or _as_resolved(resolution)
    return Resolved(opened.spec, opened.catalogs, told, resolution, whole, opened.sides)


@dataclass(frozen=True, slots=True)
class _Ready:
    """Sources as rules and targets see them.

    Attributes
    ----------
    opened, needs, dropped, settled
        What was opened, who needs numbers, what is dropped, what was dequantized.
    merged, used
        The sources without what is dropped, adapters merged; and the adapters' tensors that are part of bases now.
    beside
        The sources for targets, which look at what lies beside weights: files of adapters go before those of bases.
    changes
        What config.json of a base has to say otherwise.
    variables
        What formulas may name; its reader gives those changed files.
    """

    opened: Opened
    needs: Needs
    dropped: Dropped
    settled: Dequantized
    merged: dict[str, Catalog]
    used: frozenset[tuple[str, str]]
    beside: dict[str, Catalog]
    changes: dict[Extent, JsonObject]
    variables: Variables

    def expected(self, catalogs: Mapping[str, Catalog]) -> Expectation | None:
        """Returns what the target expects of these sources, side files and all; None without a target."""
        opened, read = self.opened, self.variables.read
        made = _expectation(opened.spec, catalogs, self.dropped, opened.output.dtype, self.variables)
        if made is None:
            return None
        return with_changes(with_side_files(made, read, opened.files, opened.output.where), self.changes, read)


def _ready(opened: Opened) -> _Ready:
    spec, catalogs, sides = opened.spec, opened.catalogs, opened.sides
    needs, dropped = _needs(spec, catalogs, opened.output), find_dropped(spec.drops, catalogs)
    settled = dequantized(catalogs, needs, sides.read)
    merged, used, changes = _merged(spec, settled.catalogs, dropped, sides)
    beside = {name: replace(one, side_files=merged[name].side_files) for name, one in settled.catalogs.items()}
    variables = Variables(beside, changed_reader(changes, sides.read), spec.variables)
    return _Ready(opened, needs, dropped, settled, merged, used, beside, changes, variables)


def _codes_agree(ready: _Ready, resolution: Resolution, expectation: Expectation | None) -> Expectation | None:
    """Checks codes beside a config.json that speaks of them; where none of them is written, neither is its word."""
    made = resolution.assignments
    for name in ready.needs.published:
        raise_all(odd_company(made, ready.beside, name, ready.settled.skipped[name]))
        catalog = ready.beside[name]
        if expectation and leaves_all_codes(made.values(), name, catalog):
            plain = ready.expected({**ready.beside, name: as_plain(catalog)})
            expectation = replace(plain or expectation, warnings=(*expectation.warnings, _left_out(name, catalog)))
    return expectation


def _terms(spec: Spec, catalogs: Mapping[str, Catalog], options: Options) -> Conditions:
    """Returns what the mapping says of the directory beside its tensors."""
    free = spec.target is not None and spec.target.name == _ANY_MODEL
    name = spec.target.roles.get("text", "text") if spec.target is not None else ""
    return Conditions(
        partial=options.partial or (spec.output is not None and spec.output.partial),
        edits=spec.config,
        counts=free or bool(spec.config.take),
        source=catalogs.get(name) if free else None,
        editable=spec.file != COMMAND_LINE,
    )


def _needs(spec: Spec, catalogs: Mapping[str, Catalog], output: OutputSettings) -> Needs:
    """Quantized sources are copied as they are into a target that takes codes, or where there is none."""
    cast = output.dtype or next((dtype for _, dtype in output.dtypes if dtype is not None), None)
    target = target_of(spec.target) if spec.target else None
    closed = target.name if target is not None and not target.codes else ""
    published = {spec.target.roles.get("text", "text")} if spec.target and not closed else set[str]()
    return needs_of(spec, catalogs, str(cast or ""), published & set(catalogs), closed)


def _left_out(name: str, catalog: Catalog) -> str:
    return f"{name}: config.json says {catalog.quantized}, and no tensor is: its quantization_config is left out"


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


def _output_path(spec: OutputSpec | None, folder: Path) -> Path | None:
    """``..`` goes by text, as the user reads the path, not by what links point to."""
    return Path(os.path.normpath(folder / Path(spec.path).expanduser())) if spec else None


def _expectation(
    spec: Spec, catalogs: Mapping[str, Catalog], dropped: Dropped, dtype: DType | None, variables: Variables
) -> Expectation | None:
    if spec.target is None:
        return None
    target = target_of(spec.target)
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


def _option(text: str, variables: Variables) -> str:
    """An option of a target may be a number of ``let:``, by its name."""
    return str(variables.get(text)) if text in variables.variables else text


def _as_resolved(resolution: Resolution) -> Expectation:
    return Expectation({name: assignment.entry.shape for name, assignment in resolution.assignments.items()})
