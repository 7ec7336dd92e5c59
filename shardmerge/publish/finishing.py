"""Makes a result appear whole or not at all: checks every receipt, then one rename.

Whoever finishes first gives the model a name of its own. What is renamed to the output path is what it has looked at
under that name, and nobody else renames it. Others that finish at the same time find the result published.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shardmerge.errors import OutputError, PublishedError, ShardmergeError, VerificationError, raise_all
from shardmerge.execute.engine import Outcome
from shardmerge.execute.pins import Pins
from shardmerge.execute.records import ReadRecords, RecordCounts, compare_records
from shardmerge.plan.value import Plan
from shardmerge.prepare.side_files import content
from shardmerge.publish.checks import is_free
from shardmerge.publish.making import make_folders, read_receipt
from shardmerge.publish.part_receipts import together, unfit
from shardmerge.publish.receipt import receipt_json
from shardmerge.publish.staging import Staging, remove, take_back
from shardmerge.storage.exchanging import exchange
from shardmerge.storage.reading import FilePool
from shardmerge.storage.writing import explained, sync_directory
from shardmerge.tensors.file_roles import RECEIPT
from shardmerge.version import __version__

# How often somebody who finds another about to publish looks again, in seconds, and how often before he takes over.
_LOOK, _LOOKS = 0.1, 20

# What rename(2) answers where the new name is taken by something that is not an empty directory.
_OCCUPIED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


def is_published(plan: Plan, out: Path) -> bool:
    """Tells whether the output path holds the result of a plan: a receipt that says so, and all files of weights."""
    if published_plan(out) != plan.id:
        return False
    files = ((out / shard.name, shard.nbytes) for shard in plan.shards)
    return all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in files)


def published_plan(out: Path) -> str:
    """Returns the id of the plan of which a receipt at the output path says that it is the result, or ``""``."""
    try:
        receipt = json.loads((out / RECEIPT).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(receipt.get("plan", "")) if isinstance(receipt, dict) else ""


def finish(
    plan: Plan, staging: Staging, out: Path, records: ReadRecords, *, overwrite: bool = False
) -> tuple[Outcome, RecordCounts]:
    """Publishes a plan whose parts are all made, and removes the staging directory.

    Returns
    -------
    outcome, records
        What was done to make it, and what became of the checksums of source records.

    Raises
    ------
    OutputError
        ``parts-missing``: some part has no receipt. ``output-exists``: the path was taken meanwhile. ``output-busy``:
        somebody else is about to publish, and does not.
    VerificationError
        ``part-differs``: a part is not what its receipt says.
    PublishedError
        ``durability-unconfirmed``, ``not-tidied``: the result is there and whole; what came after failed.
    """
    outcome = _outcome(plan, staging)
    pool = FilePool()
    pool.opened = Pins(plan.files()).opened
    counts = compare_records(outcome.records, pool, records)
    for _ in range(_LOOKS):
        if _finished(plan, staging, out, outcome, overwrite=overwrite):
            return outcome, counts
        time.sleep(_LOOK)
    raise OutputError(
        "output-busy",
        "another process is about to publish the same result, and does not come to an end",
        where=str(staging.root),
        hint="run `shardmerge finish` with the same mapping or plan when it is gone",
    )


def _outcome(plan: Plan, staging: Staging) -> Outcome:
    receipts = [(part, read_receipt(staging, part)) for part in plan.parts()]
    missing = [part for part, receipt in receipts if receipt is None]
    if missing:
        names = ", ".join(part.shard.name for part in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise OutputError(
            "parts-missing",
            f"{len(missing)} of {len(receipts)} parts are not made yet",
            where=str(staging.root),
            found=names,
            hint="run the same mapping or plan without --part: it makes what is missing, and publishes",
        )
    return together([receipt.outcome for _, receipt in receipts if receipt is not None])


def _finished(plan: Plan, staging: Staging, out: Path, outcome: Outcome, *, overwrite: bool) -> bool:
    """Publishes, or finds it published; False where somebody else is about to."""
    ready = staging.root / f"ready-{staging.who}"
    try:
        _write_rest(plan, staging, outcome)
        staging.model.rename(ready)
    except (OSError, ShardmergeError):
        if staging.model.exists():
            raise
        if is_published(plan, out):
            remove(staging.root, out, ignore_errors=True)
            return True
        take_back(staging)  # whoever it was may be gone
        return False
    _publish(plan, staging, ready, out, overwrite=overwrite)
    return True


def _write_rest(plan: Plan, staging: Staging, outcome: Outcome) -> None:
    """Writes side files, the index after all others, and the receipt."""
    digests = {}
    for side in sorted(plan.side_files, key=lambda side: side.name.endswith(".index.json")):
        data = content(plan, side)
        make_folders(staging.model, side.name)
        staging.place(staging.model / side.name, data)
        digests[side.name] = hashlib.sha256(data).hexdigest()
    staging.place(staging.model / RECEIPT, receipt_json(plan, outcome, digests, __version__))
    staging.settle(*(staging.model / name for name in (*digests, RECEIPT)))


def _publish(plan: Plan, staging: Staging, ready: Path, out: Path, *, overwrite: bool) -> None:
    """Looks at all of the result, renames it, and tells the truth about what came of that."""
    itself, durable = _inode(ready), False
    try:
        raise_all(_unfit(plan, staging, ready))
        _rename(ready, out, staging, overwrite=overwrite)
        if staging.sync:
            sync_directory(out.parent)
        durable = True
        remove(staging.root, out)
    except BaseException as error:
        if _inode(out) == itself:
            raise (_not_tidied(staging, error) if durable else _unconfirmed(out, error)) from error
        if _inode(ready) == itself:
            with suppress(OSError):
                ready.rename(staging.model)
        raise


def _unfit(plan: Plan, staging: Staging, ready: Path) -> Iterator[ShardmergeError]:
    for part in plan.parts():
        receipt = read_receipt(staging, part)
        found = "its receipt is gone" if receipt is None else unfit(receipt, part.shard, ready / part.shard.name)
        if found:
            yield VerificationError(
                "part-differs",
                "a finished part is not what its receipt says",
                where=str(staging.model / part.shard.name),
                found=found,
                hint="the same command makes it again",
            )
    wanted = {RECEIPT, *(shard.name for shard in plan.shards), *(side.name for side in plan.side_files)}
    found_files = {path.relative_to(ready).as_posix() for path in ready.rglob("*") if not path.is_dir()}
    for name in sorted(wanted ^ found_files):
        what = "a file is missing in the result" if name in wanted else "the result holds a file that is not planned"
        yield VerificationError("part-differs", what, where=str(staging.model / name), hint="begin anew with --fresh")


def _rename(ready: Path, out: Path, staging: Staging, *, overwrite: bool) -> None:
    """The commit. Renaming onto an empty directory works, onto one with content fails (POSIX rename)."""
    with explained(out):
        if out.is_dir() and is_free(out):
            _take_after(ready, out)
        try:
            if overwrite and not is_free(out):
                _replace(ready, out, staging)
            else:
                ready.rename(out)
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
            raise OutputError(
                "output-exists",
                f"cannot publish: {error.strerror}",
                where=str(out),
                hint="choose another path, or remove it first; the same command then publishes what is made",
            ) from error


def _replace(ready: Path, out: Path, staging: Staging) -> None:
    """At every instant the old directory or the new one is at ``out``, where the system can exchange them."""
    if not exchange(ready, out):
        out.rename(staging.root / f"old-{staging.who}")
        ready.rename(out)


def _take_after(ready: Path, out: Path) -> None:
    """Gives a directory the owner, the mode and the access list of the empty one whose place it takes."""
    there, here = out.stat(), ready.stat()
    if (there.st_mode, there.st_uid, there.st_gid) == (here.st_mode, here.st_uid, here.st_gid) and not os.listxattr(
        out
    ):
        return
    import shutil

    os.chown(ready, there.st_uid, there.st_gid)
    shutil.copystat(out, ready)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _unconfirmed(out: Path, error: BaseException) -> PublishedError:
    return PublishedError(
        "durability-unconfirmed",
        "the result is published and whole, but it is not sure that a power cut would leave it so",
        where=str(out),
        found=_named(error),
        hint="run `sync`; the same command then says that there is nothing left to do, and tidies up",
    )


def _not_tidied(staging: Staging, error: BaseException) -> PublishedError:
    return PublishedError(
        "not-tidied",
        "the result is published and whole, but what was needed to make it is not all removed",
        where=str(staging.root),
        found=_named(error),
        hint="remove that directory",
    )


def _named(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error).splitlines()[0] if str(error) else ""
