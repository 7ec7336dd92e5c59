"""Carries out a plan: makes the parts that have no receipt, by whoever is at hand, and publishes the result."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.errors import ShardmergeError
from shardmerge.execute.cloning import clonable_bytes
from shardmerge.execute.engine import Counters, Means, Outcome, check_device
from shardmerge.execute.executors.contract import Executor, Make, Progress, Stopped
from shardmerge.execute.executors.here import make_here
from shardmerge.execute.pins import Pins
from shardmerge.plan.schedule import largest_first
from shardmerge.plan.shard import bytes_read
from shardmerge.plan.value import Part, Plan
from shardmerge.prepare.options import Options, granted
from shardmerge.publish.checks import check_output
from shardmerge.publish.finishing import finish, is_published
from shardmerge.publish.making import Maker, is_made, read_receipt
from shardmerge.publish.results import Result, Unfinished
from shardmerge.publish.staging import Staging, remove, stagings
from shardmerge.storage.limits import bounds_cache
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import FileStamp, Record

if TYPE_CHECKING:
    from shardmerge.publish.shares import Which

# For how long a node may not see what another one has made: NFS caches what is in a directory, and what is not, for as
# long as acdirmax says, 60 seconds unless somebody changed it. How often it is looked for, both in seconds.
_CACHED, _LOOK = 65.0, 0.5


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
    try:
        _begin(staging, todo, plan.files(), out, options, more=sides)
        _have_made(todo, staging, options, progress)
    except BaseException:
        staging.give_up()
        raise
    return finish_plan(plan, out, options, made=len(todo))


def carry_out_share(
    plan: Plan, which: Which, out: Path, options: Options, progress: Progress | None = None
) -> Result | Unfinished:
    """Makes some of the parts of a plan, as one of several that do; publishes where all are made then.

    Raises
    ------
    ShardmergeError
        As ``carry_out``.
    """
    if is_published(plan, out):
        return _there_already(plan, out)
    try:
        state = make_some(plan.parts(), which, out, options, progress)
    except (OSError, ShardmergeError):
        if not is_published(plan, out):
            raise
        return _there_already(plan, out)  # others made what this one was slow to make
    if (state.missing or state.elsewhere) and not is_published(plan, out):
        return state
    return finish_plan(plan, out, options, made=state.made)


def finish_plan(plan: Plan, out: Path, options: Options, made: int = 0) -> Result:
    """Publishes a plan whose parts are made, by whomever; raises as ``publish.finishing.finish``."""
    if is_published(plan, out) and not options.fresh:
        return _there_already(plan, out, made)
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
    made = mmap.mmap(-1, 1 + max(part.number for part in parts))  # a byte a part, shared with forked processes
    begun = False
    for todo in which.rounds(parts, staging, options):
        _begin(staging, todo, parts[0].files, out, options)
        begun = True
        _have_made(todo, staging, options, progress, lambda make: which.maker(_Marking(make, made), staging))
    missing = sum(read_receipt(staging, part) is None for part in parts)
    elsewhere = begun and not staging.is_begun()
    return Unfinished(sum(made[:]), 0 if elsewhere else missing, len(parts), elsewhere)


@dataclass(frozen=True, slots=True)
class _Marking:
    """Makes parts, and says which."""

    make: Make
    made: mmap.mmap

    def __call__(self, part: Part, counters: Counters, stopped: Stopped) -> None:
        self.make(part, counters, stopped)
        self.made[part.number] = 1


def _there_already(plan: Plan, out: Path, made: int = 0) -> Result:
    root = Staging.of(out, plan.id).root
    if root.exists():
        remove(root, out)
    return Result(out, plan, Outcome({}, {}, 0, 0, 0), made=made)


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


def _have_made(
    todo: Sequence[Part],
    staging: Staging,
    options: Options,
    progress: Progress | None,
    made_by: Callable[[Make], Make] | None = None,
) -> None:
    how = granted([part.shard for part in todo], options)
    moved = sum(bytes_read(tensor) + tensor.nbytes for part in todo for tensor in part.shard.tensors)
    means = Means(how.threads, how.tile, options.io, bounds_cache(moved), options.sync, options.device, read_records)
    try:
        maker = Maker(staging, means)
        _executor(options)(todo, made_by(maker) if made_by else maker, how, progress)
        if options.engine != "here":
            await_receipts(todo, staging)
    except BaseException:
        staging.tidy()
        raise


def await_receipts(parts: Sequence[Part], staging: Staging) -> None:
    """Waits until the receipts of parts that were made are seen here, or it is certain that they never will be."""
    end = time.monotonic() + _CACHED
    while any(read_receipt(staging, part) is None for part in parts) and time.monotonic() < end:
        time.sleep(_LOOK)


def _executor(options: Options) -> Executor:
    if options.engine == "here":
        return make_here
    from shardmerge.execute.executors.ray import OnRay

    return OnRay(options.address)


def read_records(file: SourceFile) -> Iterable[Record]:
    """A torch zip has checksums of its storages; no other format does."""
    from shardmerge.sources.torch_zip import storage_records
    from shardmerge.sources.zip_members import ZIP_MAGIC

    return storage_records(file) if file.read(0, min(4, file.size)) == ZIP_MAGIC else ()
