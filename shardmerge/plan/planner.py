"""Catalogs, a resolved mapping and a target's expectation become a plan. Pure: no file is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from shardmerge.compose import cast_to, own_dtype
from shardmerge.dtypes import DType
from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.mapping.codes import odd_codes
from shardmerge.mapping.near import NameIndex, listed
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.resolution import Assignment, Resolution
from shardmerge.mapping.spec import Rule
from shardmerge.plan.moments import NO_MOMENTS, Moments
from shardmerge.plan.shard import PlannedTensor
from shardmerge.plan.shards import DEFAULT_SHARD_SIZE, lay_out
from shardmerge.plan.value import Plan, PlannedSource, Unused
from shardmerge.targets.expectation import Expectation, Format
from shardmerge.tensors import Catalog, FileStamp

# More lines of one kind than this help nobody.
_FEW = 5


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """What the user decides about the output.

    Attributes
    ----------
    dtype
        Float type of all float tensors; None to keep each tensor's own.
    dtypes
        For some target names another one, or None to keep their own; the first template that matches decides.
    shard_size
        Most bytes of tensors in a file.
    format
        Of the files of weights.
    root
        For ``dcp``: the keys under which a state dict holds the model.
    where
        The place of ``output:`` in the mapping, for messages.
    """

    dtype: DType | None = None
    dtypes: tuple[tuple[Template, DType | None], ...] = ()
    shard_size: int = DEFAULT_SHARD_SIZE
    format: Format = "safetensors"
    root: tuple[str, ...] = ()
    where: str = ""


def make_plan(
    target: str,
    catalogs: Mapping[str, Catalog],
    paths: Mapping[str, str],
    resolution: Resolution,
    expectation: Expectation,
    options: OutputSettings,
    moments: Moments = NO_MOMENTS,
) -> Plan:
    """Returns the plan of a resolved mapping.

    Parameters
    ----------
    target
        Name of the target.
    catalogs, paths
        By source name; the paths as the user wrote them.
    resolution
        Which source tensor each target name takes, already checked against ``expectation``.
    expectation
        Final shapes and side files.
    options
        Of the output.
    moments
        Of the optimizer, by the names of targets, where they are taken along from the only source.

    Raises
    ------
    MappingError
        ``cannot-cast``: a float type that no cast leads from or to. ``packed-weights``, ``codes-without-scales``: codes
        of quantized weights that cannot be copied so.
    """
    tensors: list[PlannedTensor] = []
    problems: list[ShardmergeError] = []
    texts: dict[int, str] = {}  # one a rule, not one a tensor
    for assignment in resolution.assignments.values():
        rule = assignment.rule
        if id(rule) not in texts:
            texts[id(rule)] = rule_text(rule)
        try:
            tensors.append(_planned(assignment, expectation, options, texts[id(rule)]))
        except MappingError as error:
            problems.append(_with_rule(error, assignment))
    final = partial(_final_dtype, expectation=expectation, options=options)
    codes = odd_codes(resolution.assignments, catalogs, options.dtype, final)
    raise_all([*problems, *codes, *_unused_dtypes(options, resolution)])
    copies = _copies(resolution, meant=True)
    shards, indexes = lay_out(tensors, options.shard_size, expectation.groups, options.format, options.root, moments)
    return Plan(
        target,
        tuple(
            _source(name, paths[name], catalog, copies.get(name, ()), moments.files)
            for name, catalog in sorted(catalogs.items())
        ),
        shards,
        (*expectation.side_files, *indexes),
        tuple(_unused(resolution, catalogs)),
        (*_source_warnings(catalogs), *expectation.warnings, *moments.warnings, *_written_twice(resolution)),
        left_behind=expectation.left_behind,
    )


def _planned(assignment: Assignment, expectation: Expectation, options: OutputSettings, rule: str) -> PlannedTensor:
    entry = assignment.entry
    final = _final_dtype(assignment, expectation, options)
    shape = expectation.tensors.get(assignment.target, entry.shape)
    if shape != entry.shape:
        if entry.dtype.kind != "float":
            what = f"{entry.dtype} {list(entry.shape)} holds codes, and rows of codes can be neither made nor cut off"
            raise MappingError("packed-weights", what, hint="leave `vocabulary:` out, or name the 16-bit model")
        from shardmerge.plan.resizing import resized

        entry = resized(entry, shape, expectation.resized[assignment.target])
    entry = cast_to(entry, final) if final.kind == "float" else entry
    return PlannedTensor(assignment.target, entry, rule, assignment.target)


def _final_dtype(assignment: Assignment, expectation: Expectation, options: OutputSettings) -> DType:
    entry = assignment.entry
    if assignment.pinned or entry.dtype.kind != "float":
        return entry.dtype
    for template, dtype in options.dtypes:
        if template.match(assignment.target) is not None:
            return dtype or own_dtype(entry)
    if options.dtype is None or assignment.target in expectation.keep:
        return own_dtype(entry)
    return options.dtype


def _with_rule(error: MappingError, assignment: Assignment) -> MappingError:
    what = f"{assignment.target}: {error.what}"
    hint = error.hint or f"leave `dtype` out, or add `keep: [{assignment.target}]` under `output:`"
    return MappingError(error.code, what, where=str(assignment.rule.mark), found=error.found, hint=hint)


def _unused_dtypes(options: OutputSettings, resolution: Resolution) -> Iterator[ShardmergeError]:
    """A name under ``keep`` or ``dtypes`` that no tensor has is a mistake that would go unseen; so is an idle one."""
    index = NameIndex(resolution.assignments)
    deciding = _deciding(options, resolution)
    for place, (template, dtype) in enumerate(options.dtypes):
        cases = [one for name, one in resolution.assignments.items() if template.match(name) is not None]
        if not cases:
            yield MappingError(
                "keep-matches-nothing",
                f"no target tensor is called `{template}`, which `keep` or `dtypes` names",
                where=options.where,
                hint=f"near names: {', '.join(near)}"
                if (near := index.near(template.text))
                else "`shardmerge plan MAPPING --tensors` lists the names, with that line taken out",
            )
        elif dtype is not None and place not in deciding:
            if any(one.entry.dtype.kind == "float" for one in cases):
                why, hint = (
                    "an earlier line, or an op `cast`, says these types",
                    "write it before the others, or remove it",
                )
            else:
                why, hint = "none of these tensors is float", "remove it"
            what = f"`{template}` under `dtypes` decides nothing: {why}"
            yield MappingError("no-effect", what, where=options.where, hint=hint)


def _deciding(options: OutputSettings, resolution: Resolution) -> set[int]:
    """Returns which of ``dtypes`` are the first that match a float tensor whose type is open."""
    if not options.dtypes:
        return set()
    numbered = list(enumerate(options.dtypes))
    floats = (n for n, one in resolution.assignments.items() if one.entry.dtype.kind == "float" and not one.pinned)
    first = (next((i for i, (template, _) in numbered if template.match(name) is not None), -1) for name in floats)
    return set(first)


def rule_text(rule: Rule) -> str:
    """Returns a rule for people, with its file's base name, line and column."""
    mark = rule.mark
    return f"{mark.file.rsplit('/', 1)[-1]}:{mark.line}:{mark.column} {rule.target}"


def _source(
    name: str, path: str, catalog: Catalog, copies: Sequence[str], more: Sequence[FileStamp] = ()
) -> PlannedSource:
    """Returns a source; ``more``: files that are read besides, which may be its own."""
    notes = (*catalog.notes, *copies[:_FEW])
    files = tuple({stamp.path: stamp for stamp in (*more, *catalog.files)}.values())
    return PlannedSource(name, path, catalog.kind, catalog.fingerprint(), files, notes)


def _written_twice(resolution: Resolution) -> Iterator[str]:
    for source, texts in _copies(resolution, meant=False).items():
        yield from (f"{source}: {text}" for text in texts[:_FEW])
        if len(texts) > _FEW:
            yield f"{source}: {len(texts) - _FEW} more tensors are written under several names"


def _source_warnings(catalogs: Mapping[str, Catalog]) -> tuple[str, ...]:
    return tuple(f"{name}: {text}" for name, catalog in sorted(catalogs.items()) for text in catalog.warnings)


def _unused(resolution: Resolution, catalogs: Mapping[str, Catalog]) -> Iterator[Unused]:
    for one in resolution.shadowed:
        why = f"shadowed: {one.target} is taken from elsewhere"
        if one.narrower and one.target in resolution.assignments:  # no line: it is no part of the plan's id
            why = f"a narrower rule wins: `{resolution.assignments[one.target].rule.target}` makes {one.target}"
        yield Unused(one.source, one.name, why)
    yield from (Unused(source, name, "dropped") for source, name in resolution.dropped)
    for source, catalog in sorted(catalogs.items()):
        yield from (Unused(source, name, "a placeholder without data") for name in sorted(catalog.absent))


def _copies(resolution: Resolution, *, meant: bool) -> dict[str, list[str]]:
    """Returns by source what is written more than once: in rules of one's own it often is a mistake."""
    found: dict[str, list[str]] = {}
    for one in resolution.copies:
        if one.meant == meant:
            text = f"{one.name} is written {len(one.targets)} times: {listed(one.targets)}"
            found.setdefault(one.source, []).append(text)
    return found
