"""Carries out a plan: makes the parts that have no receipt, by whoever is at hand, and publishes the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardmerge.execute.cloning import clonable_bytes
from shardmerge.execute.engine import Means, Outcome, check_device
from shardmerge.execute.executors.contract import Progress
from shardmerge.execute.executors.here import make_here
from shardmerge.execute.pins import Pins
from shardmerge.execute.records import RecordCounts
from shardmerge.plan.schedule import Schedule, largest_first
from shardmerge.plan.shard import bytes_read
from shardmerge.plan.value import Part, Plan
from shardmerge.prepare.options import Options, granted
from shardmerge.publish.checks import check_output
from shardmerge.publish.finishing import finish, is_published
from shardmerge.publish.making import Maker, is_made
from shardmerge.publish.staging import Staging, remove, stagings
from shardmerge.storage.limits import bounds_cache
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Record


@dataclass(frozen=True, slots=True)
class Result:
    """A published directory.

    Attributes
    ----------
    path
        The directory.
    plan
        What was carried out.
    outcome
        Overflows, checksums, bytes.
    records
        What became of the checksums that source files carry.
    made
        How many parts were made; the others had been made before.
    """

    path: Path
    plan: Plan
    outcome: Outcome
    records: RecordCounts = field(default_factory=RecordCounts)
    made: int = 0


def carry_out(plan: Plan, out: Path, options: Options, progress: Progress | None = None) -> Result:
    """Runs a plan and publishes the result as ``out``.

    What an earlier run of the same plan made is kept. What is published already is left as it is.

    Raises
    ------
    ShardmergeError
        See ``publish.checks.check_output``, ``execute.engine.Workshop.make`` and ``publish.finishing.finish``. Whatever is
        raised but a ``PublishedError``, ``out`` is as it was.
    """
    if is_published(plan, out) and not options.fresh:
        return _there_already(plan, out)
    staging, todo = begin(plan, out, options)
    how = granted([part.shard for part in todo], options)
    _have_made(todo, staging, how, options, progress)
    outcome, records = finish(plan, staging, out, read_records, overwrite=options.overwrite)
    return Result(out, plan, outcome, records, len(todo))


def _there_already(plan: Plan, out: Path) -> Result:
    for root in stagings(out):
        if root == Staging.of(out, plan.id).root:
            remove(root, out)
    return Result(out, plan, Outcome({}, {}, 0, 0, 0))


def begin(plan: Plan, out: Path, options: Options) -> tuple[Staging, list[Part]]:
    """Returns where parts gather, and the parts that are not made yet, the largest first."""
    staging = Staging.of(out, plan.id, sync=options.sync)
    if options.fresh:
        for root in stagings(out):
            remove(root, out)
    parts = plan.parts()
    todo = [parts[n] for n in largest_first(plan.shards) if not is_made(staging, parts[n], recheck=options.recheck)]
    needed = sum(part.shard.nbytes for part in todo) + sum(side.nbytes for side in plan.side_files)
    check_output(plan, out, needed - clonable_bytes([part.shard for part in todo], out), overwrite=options.overwrite)
    check_device(options.device)
    Pins(plan.files()).check()
    staging.begin(plan, out)
    return staging, todo


def _have_made(
    todo: Sequence[Part], staging: Staging, how: Schedule, options: Options, progress: Progress | None
) -> None:
    tensors = [tensor for part in todo for tensor in part.shard.tensors]
    moved = sum(bytes_read(tensor) + tensor.nbytes for tensor in tensors)
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
