"""Catalogs, a resolved mapping and a target's expectation become a plan. Pure: no file is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.dtypes import DType
from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.mapping.resolve import Assignment, Resolution
from shardmerge.memory import plan_memory, row_width
from shardmerge.ops.casts import CASTABLE, Cast
from shardmerge.ops.vocabulary import MeanRows
from shardmerge.plan import (
    Compute,
    Copy,
    Part,
    Plan,
    PlannedSource,
    PlannedTensor,
    Read,
    Reduce,
    Step,
    Unused,
)
from shardmerge.targets.expectation import Expectation, SideFile
from shardmerge.targets.shards import DEFAULT_SHARD_SIZE, index_json, lay_out
from shardmerge.tensors import Catalog


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the user decides about the output.

    Attributes
    ----------
    dtype
        Float type of all float tensors; None to keep each tensor's own.
    shard_size
        Most bytes of tensors in a file.
    memory, workers
        Budget in bytes, and threads.
    """

    dtype: DType | None = None
    shard_size: int = DEFAULT_SHARD_SIZE
    memory: int = 256 << 20
    workers: int = 2


def make_plan(
    target: str,
    catalogs: Mapping[str, Catalog],
    paths: Mapping[str, str],
    resolution: Resolution,
    expectation: Expectation,
    options: OutputOptions,
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

    Raises
    ------
    MappingError
        ``cannot-cast``: a float type that no cast leads from or to.
    ResourceError
        ``memory-budget``.
    """
    tensors: list[PlannedTensor] = []
    problems: list[ShardmergeError] = []
    for assignment in resolution.assignments.values():
        try:
            tensors.append(_planned(assignment, catalogs, expectation, options.dtype))
        except MappingError as error:
            problems.append(error)
    raise_all(problems)
    shards = lay_out(tensors, options.shard_size)
    sides = list(expectation.side_files)
    if len(shards) > 1:
        sides.append(SideFile("model.safetensors.index.json", (index_json(shards),)))
    return Plan(
        target,
        tuple(_source(name, paths[name], catalog) for name, catalog in sorted(catalogs.items())),
        shards,
        tuple(sides),
        _unused(resolution),
        expectation.warnings,
        plan_memory(tensors, budget=options.memory, workers=options.workers),
    )


def _planned(
    assignment: Assignment, catalogs: Mapping[str, Catalog], expectation: Expectation, dtype: DType | None
) -> PlannedTensor:
    entry = catalogs[assignment.source][assignment.name]
    shape = expectation.tensors.get(assignment.target, entry.shape)
    final = dtype if dtype is not None and entry.dtype.kind == "float" else entry.dtype
    read = Read(assignment.source, entry)
    parts = [Part(0, entry.numel, _step(read, final, assignment))] if entry.numel else []
    grown = shape[0] - entry.shape[0] if assignment.target in expectation.grown and shape else 0
    if grown > 0:
        mean = MeanRows(entry.dtype, final, grown)
        parts.append(Part(entry.numel, grown * row_width(shape), Reduce(mean, read)))
    return PlannedTensor(assignment.target, final, shape, tuple(parts), rule_text(assignment), 0)


def _step(read: Read, final: DType, assignment: Assignment) -> Step:
    source = read.entry.dtype
    if source == final:
        return Copy(read)
    if source.name not in CASTABLE or final.name not in CASTABLE:
        raise MappingError(
            "cannot-cast",
            f"{assignment.target} is {source} and cannot be cast to {final}",
            where=str(assignment.rule.mark),
            hint="leave `dtype` out to keep every tensor's own type",
        )
    return Compute(Cast(source, final), read)


def rule_text(assignment: Assignment) -> str:
    """Returns the rule of an assignment for people, with its file's base name, line and column."""
    mark = assignment.rule.mark
    return f"{mark.file.rsplit('/', 1)[-1]}:{mark.line}:{mark.column} {assignment.rule.target}"


def _source(name: str, path: str, catalog: Catalog) -> PlannedSource:
    return PlannedSource(name, path, catalog.kind, catalog.fingerprint(), catalog.files, catalog.notes)


def _unused(resolution: Resolution) -> tuple[Unused, ...]:
    shadowed = (Unused(source, name, f"shadowed: {target} is taken from elsewhere")
                for source, name, target in resolution.shadowed)  # fmt: skip
    dropped = (Unused(source, name, "dropped") for source, name in resolution.dropped)
    return (*shadowed, *dropped)
