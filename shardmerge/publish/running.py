"""Carries out a plan and publishes the result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.plan.value import Plan, bytes_read
from shardmerge.prepare.options import Options, Prepared
from shardmerge.prepare.side_files import content
from shardmerge.storage.limits import bounds_cache
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.tensors import Record, SideFile

if TYPE_CHECKING:
    from shardmerge.execute.engine import Outcome, Progress


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
    """

    path: Path
    plan: Plan
    outcome: Outcome


def carry_out(prepared: Prepared, out: Path, options: Options, progress: Progress | None = None) -> Result:
    """Runs a plan and publishes the result as ``out``.

    Raises
    ------
    ShardmergeError
        See ``publish.check_output`` and ``execute.engine.execute``. Whatever is raised, ``out`` is as it was.
    """
    from shardmerge.execute.cloning import clonable_bytes
    from shardmerge.execute.engine import check_device, execute
    from shardmerge.publish.receipt import receipt_json
    from shardmerge.publish.staging import check_output, staged
    from shardmerge.storage.writing import write_small
    from shardmerge.tensors.file_roles import RECEIPT
    from shardmerge.version import __version__

    plan = prepared.plan
    check_output(plan, out, clonable_bytes(plan, out))
    check_device(options.device)
    bounded = bounds_cache(plan.file_bytes + sum(bytes_read(tensor) for tensor in plan.tensors()))
    with staged(plan, out, sync=options.sync) as staging:
        _make_folders(plan, staging)
        pool = FilePool(options.io, bounded=bounded)
        outcome = execute(
            plan, staging, pool, sync=options.sync, progress=progress, device=options.device, records=_records
        )
        digests = {side.name: _write_side_file(staging, side, plan, sync=options.sync) for side in _index_last(plan)}
        receipt = receipt_json(plan, outcome, digests, __version__)
        write_small(staging / RECEIPT, receipt, sync=options.sync)
    return Result(out, plan, outcome)


def _records(file: SourceFile) -> Iterable[Record]:
    """A torch zip has checksums of its storages; no other format does."""
    from shardmerge.sources.torch_zip import storage_records
    from shardmerge.sources.zip_members import ZIP_MAGIC

    return storage_records(file) if file.read(0, min(4, file.size)) == ZIP_MAGIC else ()


def _make_folders(plan: Plan, staging: Path) -> None:
    for name in [*(shard.name for shard in plan.shards), *(side.name for side in plan.side_files)]:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)


def _index_last(plan: Plan) -> list[SideFile]:
    """The index comes last: a directory without it is visibly not finished."""
    return sorted(plan.side_files, key=lambda side: side.name.endswith(".index.json"))


def _write_side_file(staging: Path, side: SideFile, plan: Plan, *, sync: bool) -> str:
    import hashlib

    from shardmerge.storage.writing import write_small

    data = content(plan, side)
    write_small(staging / side.name, data, sync=sync)
    return hashlib.sha256(data).hexdigest()
