"""Carries out a plan: makes the parts that have no receipt, by whoever is at hand, and publishes the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from shardmerge.execute.cloning import clonable_bytes
from shardmerge.execute.engine import Means, Outcome, check_device
from shardmerge.execute.executors.contract import Progress
from shardmerge.execute.executors.here import make_here
from shardmerge.execute.pins import Pins
from shardmerge.plan.schedule import largest_first
from shardmerge.plan.shard import bytes_read
from shardmerge.plan.value import Part, Plan
from shardmerge.prepare.options import Options, granted
from shardmerge.publish.checks import check_output
from shardmerge.publish.finishing import finish, is_published
from shardmerge.publish.making import Maker, is_made, read_receipt, receipt_path
from shardmerge.publish.results import Result, Unfinished
from shardmerge.publish.shares import All, Which
from shardmerge.publish.staging import Staging, remove, stagings
from shardmerge.storage.limits import bounds_cache
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import FileStamp, Record


def carry_out(plan: Plan, out: Path, options: Options, progress: Progress | None = None) -> Result:
    """Runs a plan and publishes the result as ``out``.

    What an earlier run of the same plan made is kept. What is published already is left as it is.

    Raises
    ------
    ShardmergeError
        See ``publish.checks.check_output``, ``execute.engine.Workshop.make`` and ``publish.finishing.finish``.
        Whatever is raised but a ``PublishedError``, ``out`` is as it was.
    """
    if is_published(plan, out) and not options.fresh:
        return _there_already(plan, out)
    parts = plan.parts()
    staging = Staging.of(out, plan.id, sync=options.sync)
    if options.fresh:
        for root in stagings(out):
            remove(root, out)
    todo = [part for part in _largest_first(parts) if not is_made(staging, part, recheck=options.recheck)]
    sides = sum(side.nbytes for side in plan.side_files)
    _begin(staging, todo, plan.files(), out, options, more=sides)
    _have_made(todo, staging, options, progress)
    return finish_plan(plan, out, options, made=len(todo))


def finish_plan(plan: Plan, out: Path, options: Options, made: int = 0) -> Result:
    """Publishes a plan whose parts are made, by whomever; raises as ``publish.finishing.finish``."""
    if is_published(plan, out) and not options.fresh:
        return _there_already(plan, out)
    staging = Staging.of(out, plan.id, sync=options.sync)
    outcome, records = finish(plan, staging, out, read_records, overwrite=options.overwrite)
    return Result(out, plan, outcome, records, made)


def make_some(
    parts: Sequence[Part], which: Which, out: Path, options: Options, progress: Progress | None = None
) -> Unfinished:
    """Makes some of the parts of a plan, as one of several that do; publishes nothing.

    Parameters
    ----------
    parts
        All parts of the plan, or those that this one is to make.
    which
        Its share, or whatever nobody has made or is visibly at work on.
    out, options, progress
        As for ``carry_out``.

    Raises
    ------
    ShardmergeError
        As ``carry_out``.
    """
    staging = Staging.of(out, parts[0].plan, sync=options.sync)
    made = 0
    for todo in which.rounds(parts, staging, options):
        _begin(staging, todo, parts[0].files, out, options)
        _have_made(todo, staging, options, progress)
        made += len(todo)
    missing = sum(read_receipt(staging, part) is None for part in parts)
    return Unfinished(made, missing, len(parts))


def make_share(
    parts: Sequence[Part], plan: tuple[str, int], out: Path, options: Options, progress: Progress | None = None
) -> Unfinished:
    """Makes parts of a plan of which this one holds no others; publishes nothing.

    Parameters
    ----------
    parts
        Its share.
    plan
        The plan's id, and how many parts it has.
    out, options, progress
        As for ``carry_out``.

    Raises
    ------
    ShardmergeError
        As ``carry_out``.
    """
    plan_id, count = plan
    made = make_some(parts, All(), out, options, progress).made if parts else 0
    staging = Staging.of(out, plan_id, sync=options.sync)
    missing = sum(not receipt_path(staging, number).is_file() for number in range(count))
    return Unfinished(made, missing, count)


def _there_already(plan: Plan, out: Path) -> Result:
    root = Staging.of(out, plan.id).root
    if root.exists():
        remove(root, out)
    return Result(out, plan, Outcome({}, {}, 0, 0, 0))


def _largest_first(parts: Sequence[Part]) -> list[Part]:
    return [parts[n] for n in largest_first([part.shard.nbytes for part in parts])]


def _begin(
    staging: Staging, todo: Sequence[Part], files: Sequence[FileStamp], out: Path, options: Options, more: int = 0
) -> None:
    """Checks all that can be checked before anything is written, and makes the staging directory."""
    shards = [part.shard for part in todo]
    needed = sum(shard.nbytes for shard in shards) + more - clonable_bytes(shards, out)
    check_output(files, out, needed, overwrite=options.overwrite)
    check_device(options.device)
    Pins(files).check()
    staging.begin(files, out)


def _have_made(todo: Sequence[Part], staging: Staging, options: Options, progress: Progress | None) -> None:
    how = granted([part.shard for part in todo], options)
    moved = sum(bytes_read(tensor) + tensor.nbytes for part in todo for tensor in part.shard.tensors)
    means = Means(how.threads, how.tile, options.io, bounds_cache(moved), options.sync, options.device, read_records)
    try:
        make_here(todo, Maker(staging, means), how, progress)
    except BaseException:
        staging.tidy()
        raise


def read_records(file: SourceFile) -> Iterable[Record]:
    """A torch zip has checksums of its storages; no other format does."""
    from shardmerge.sources.torch_zip import ZIP_MAGIC, storage_records

    return storage_records(file) if file.read(0, min(4, file.size)) == ZIP_MAGIC else ()
