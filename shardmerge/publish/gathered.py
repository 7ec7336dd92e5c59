"""What has gathered of a plan: receipts of all parts, and that what they read of records is sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shardmerge.errors import CheckpointError, OutputError
from shardmerge.execute.digests import Digester, taken
from shardmerge.execute.engine import Outcome
from shardmerge.execute.patience import Halt
from shardmerge.execute.pins import Pins
from shardmerge.execute.records import DAMAGED, ReadRecords, RecordCounts, compare_records
from shardmerge.plan.shard import PlannedShard
from shardmerge.plan.value import Part, Plan
from shardmerge.publish.making import read_receipt, receipt_path
from shardmerge.publish.part_receipts import PartReceipt
from shardmerge.publish.staging import Staging
from shardmerge.storage.packed import source_opener
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.storage.writing import explained


def compared(plan: Plan, staging: Staging, outcome: Outcome, records: ReadRecords) -> RecordCounts:
    """Compares records; a part that is made of a damaged one is none, since a sound copy may have the same times."""
    pool = FilePool(open_file=source_opener())
    pool.opened = Pins(plan.files()).opened
    try:
        return compare_records(outcome.records, pool, records)
    except CheckpointError as error:
        if error.code == DAMAGED:
            _unmake(plan, staging)
        raise


def _unmake(plan: Plan, staging: Staging) -> None:
    """Takes back all parts that were made of records; which of them has the damaged bytes nobody can tell."""
    for part in plan.parts():
        receipt = read_receipt(staging, part)
        if receipt is not None and receipt.outcome.records:
            for path in (receipt_path(staging, part.number), staging.model / part.shard.name):
                with explained(path):
                    path.unlink(missing_ok=True)
    staging.give_up()


def receipts_of(plan: Plan, staging: Staging) -> list[PartReceipt]:
    """Returns the receipts of all parts; raises ``parts-missing`` where some have none."""
    found = [(part, read_receipt(staging, part)) for part in plan.parts()]
    without = [part for part, receipt in found if receipt is None]
    if without:
        raise missing(without, plan, staging)
    return [receipt for _, receipt in found if receipt is not None]


def missing(parts: Sequence[Part], plan: Plan, staging: Staging) -> OutputError:
    """Returns the error of parts that are not made."""
    return OutputError(
        "parts-missing",
        f"{len(parts)} of {len(plan.shards)} parts are not made yet",
        where=str(staging.root),
        found=", ".join(part.shard.name for part in parts[:3]) + (", ..." if len(parts) > 3 else ""),
        hint="run the same mapping or plan without --part: it makes what is missing, and publishes",
    )


def digested(plan: Plan, folder: Path, outcome: Outcome, halt: Halt) -> Outcome:
    """Returns an outcome with the digests of all files: those of parts that were made without are taken now."""
    digests, files = dict(outcome.digests), dict(outcome.file_digests)
    for shard in plan.shards:
        if shard.name not in files:
            own, file = _taken(shard, folder / shard.name, outcome, halt)
            digests.update(own)
            files.update(file)
    return replace(outcome, digests=digests, file_digests=files)


def all_or_none(plan: Plan, outcome: Outcome) -> Outcome:
    """Returns an outcome without digests where not all parts were made with them."""
    whole = all(shard.name in outcome.file_digests for shard in plan.shards)
    return outcome if whole else replace(outcome, digests={}, file_digests={})


def _taken(shard: PlannedShard, path: Path, outcome: Outcome, halt: Halt) -> tuple[dict[str, str], dict[str, str]]:
    with SourceFile(path) as file:
        digester = Digester.of_shard(shard, file.read_into)
        while digester.at < shard.nbytes:
            halt.check()
            digester.step(shard.nbytes)
    sums = {one.name: outcome.checksums[one.name] for one in shard.tensors if one.name in outcome.checksums}
    return taken(digester, shard, path, sums)
