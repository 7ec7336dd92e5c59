"""Makes a result appear whole or not at all: checks every receipt, then one rename.

Whoever finishes gives the model a name of its own, so that nobody else puts anything into it, or renames it. What it
renames to the output path is what it has looked at under that name. A run that starts takes such a name away, since its
owner may be gone; an owner that is not finds so by its next call that needs the name, and begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardmerge.errors import (
    OutputError,
    PublishedError,
    ShardmergeError,
    VerificationError,
    raise_all,
)
from shardmerge.execute.engine import Outcome
from shardmerge.execute.patience import Halt
from shardmerge.execute.records import ReadRecords, RecordCounts
from shardmerge.plan.value import Plan
from shardmerge.prepare.side_files import content
from shardmerge.publish.checks import check_place, is_free
from shardmerge.publish.gathered import all_or_none, compared, digested, missing, receipts_of
from shardmerge.publish.making import make_folders
from shardmerge.publish.part_receipts import together, unfit
from shardmerge.publish.receipt import receipt_json
from shardmerge.publish.staging import Staging, inode, is_gone, remove, stagings
from shardmerge.storage.exchanging import OCCUPIED, exchange
from shardmerge.storage.listing import files_below
from shardmerge.storage.writing import explained, sync_above, sync_directory, sync_file
from shardmerge.system_errors import PASSING_READS, PASSING_WRITES, tried_again
from shardmerge.tensors.file_roles import RECEIPT
from shardmerge.version import __version__

# How often somebody who finds another about to publish looks again, in seconds, and for how long that other may show no
# sign of life before he takes over: he touches the directory with every file that he looks at.
_LOOK, _SILENT = 0.1, 60.0

# How often a model that nobody has is looked for: it has another name for a moment whenever it changes hands.
_TURNS = 9


@dataclass(frozen=True)
class Goal:
    """A plan's result at its output path.

    Attributes
    ----------
    plan, out
        The plan, and the path.
    other
        What was there at first, and is not what is wanted, though it may look like it (``--fresh``).
    """

    plan: Plan
    out: Path
    other: tuple[int, int] | None = None

    @classmethod
    def of(cls, plan: Plan, out: Path, *, fresh: bool = False) -> Goal:
        """Returns the goal of a run; a fresh one is not content with what is there."""
        return cls(plan, out, inode(out) if fresh else None)

    def reached(self) -> bool:
        """Tells whether the result is there: a receipt that says so, and all files of weights."""
        if published_plan(self.out) != self.plan.id or inode(self.out) == self.other:
            return False
        files = ((self.out / shard.name, shard.nbytes) for shard in self.plan.shards)
        return all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in files)

    def settle(self, *, sync: bool) -> None:
        """Makes the name of the result durable, and removes what was needed to make it.

        Raises
        ------
        PublishedError
            ``durability-unconfirmed``, ``not-tidied``.
        """
        try:
            if sync:
                tried_again(lambda: sync_directory(self.out.parent), PASSING_WRITES)
        except ShardmergeError as error:
            raise unconfirmed(self.out, error.what) from error
        root = Staging.of(self.out, self.plan.id).root
        try:
            tried_again(lambda: self._tidy(root), PASSING_READS)
        except ShardmergeError as error:
            raise _not_tidied(error.where, error.what) from error
        except OSError as error:
            raise _not_tidied(str(root), str(error.strerror)) from error

    def _tidy(self, root: Path) -> None:
        for one in stagings(self.out):
            if one == root or is_gone(one):
                remove(one, self.out)


def published_plan(out: Path) -> str:
    """Returns the id of the plan of which a receipt at the output path says that it is the result, or ``""``."""
    try:
        receipt = json.loads((out / RECEIPT).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(receipt.get("plan", "")) if isinstance(receipt, dict) else ""


def finish(  # what, from where to where, and how
    goal: Goal,
    staging: Staging,
    records: ReadRecords,
    halt: Halt,
    *,
    overwrite: bool = False,
    recheck: bool = False,
    sha256: bool = False,
) -> tuple[Outcome, RecordCounts]:
    """Publishes a plan whose parts are all made, and removes the staging directory.

    Parameters
    ----------
    goal, staging
        What is to be where, and from where.
    records
        Gives the records of a source file that have checksums there.
    halt
        Once it is asked for, nothing is published any more.
    overwrite
        Whether a result of shardmerge at the output path is replaced.
    recheck
        Whether all bytes of the parts are compared, and not some.
    sha256
        Whether the digests of parts that were made without are taken now. If not, the receipt has those of all files
        where all parts were made with digests, and none elsewhere.

    Returns
    -------
    outcome, records
        What was done to make it, and what became of the checksums of source records.

    Raises
    ------
    OutputError
        ``parts-missing``: some part is not made. ``output-exists``, ...: as ``publish.checks.check_place``.
    VerificationError
        ``part-differs``: a part is not what its receipt says.
    InterruptedRunError
        ``interrupted``: it was halted before.
    PublishedError
        ``durability-unconfirmed``, ``not-tidied``: the result is there and whole; what came after failed.
    """
    outcome = together([receipt.outcome for receipt in receipts_of(goal.plan, staging)])
    counts = compared(goal.plan, staging, outcome, records)
    staging.take_back()
    turn = 0
    while not (_Publishing(goal, staging, outcome, halt, overwrite, recheck, sha256).done() or goal.reached()):
        _wait(staging, halt, _SILENT * 2**turn)
        turn += 1
        if turn > _TURNS and not staging.claimed() and not staging.model.exists():
            raise missing(goal.plan.parts(), goal.plan, staging)
    goal.settle(sync=staging.sync)
    return outcome, counts


def _wait(staging: Staging, halt: Halt, silent: float) -> None:
    """Waits while somebody else is visibly about to publish; if he no longer is, takes it from him."""
    seen, since = _life(staging), time.monotonic()
    while True:
        halt.check()
        time.sleep(_LOOK)
        now = _life(staging)
        if not now:
            return
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > silent:
            staging.take_back()
            return


def _life(staging: Staging) -> list[tuple[str, int]]:
    """Returns who is about to publish, and when he last touched something there."""
    found = []
    for ready in staging.claimed():
        with suppress(OSError):
            found.append((ready.name, ready.stat().st_mtime_ns))
    return found


@dataclass(frozen=True)
class _Publishing:
    """One attempt."""

    goal: Goal
    staging: Staging
    outcome: Outcome
    halt: Halt
    overwrite: bool
    recheck: bool
    sha256: bool

    def done(self) -> bool:
        """Claims the model and publishes it; False where somebody else has it, or took it away meanwhile."""
        staging, out = self.staging, self.goal.out
        with explained(staging.root), suppress(FileNotFoundError):
            staging.model.rename(staging.ready)
        itself = inode(staging.ready)
        if itself is None:
            return False
        try:
            self._complete()
            with explained(out), self.halt.done_or_not():
                self._commit()
        except (OSError, ShardmergeError):
            # Taken away, so that whatever failed failed; or published by a file server that says it did not.
            if inode(staging.ready) != itself:
                return False
            with suppress(OSError):
                staging.ready.rename(staging.model)
            raise
        return True

    def _complete(self) -> None:
        """Looks at all parts, and writes what goes with them: the index after all other files, then the receipt."""
        plan, staging, digests = self.goal.plan, self.staging, {}
        raise_all(self._unfit())
        outcome = (
            digested(plan, staging.ready, self.outcome, self.halt) if self.sha256 else all_or_none(plan, self.outcome)
        )
        for side in sorted(plan.side_files, key=lambda side: side.name.endswith(".index.json")):
            data = content(plan, side)
            make_folders(staging.ready, side.name)
            staging.place(staging.ready / side.name, data)
            digests[side.name] = hashlib.sha256(data).hexdigest()
        staging.place(staging.ready / RECEIPT, receipt_json(plan, outcome, digests, __version__))
        wanted = {RECEIPT, *digests, *(shard.name for shard in plan.shards)}
        raise_all(_strange(staging, wanted))
        if is_free(self.goal.out) and self.goal.out.is_dir():
            _take_after(staging.ready, self.goal.out)
        staging.settle(*(staging.ready / name for name in wanted))

    def _unfit(self) -> Iterator[ShardmergeError]:
        parts, staging = self.goal.plan.parts(), self.staging
        receipts = receipts_of(self.goal.plan, staging)
        if staging.sync and not all(receipt.synced for receipt in receipts):
            sync_above(self.goal.out.parent)
        for part, receipt in zip(parts, receipts, strict=True):
            path = staging.ready / part.shard.name
            found = unfit(receipt, part.shard, path, recheck=self.recheck)
            if found:
                yield VerificationError(
                    "part-differs",
                    "a finished part is not what its receipt says",
                    where=str(staging.model / part.shard.name),
                    found=found,
                    hint="run the same mapping or plan without --part: it makes that part again",
                )
            elif staging.sync and not receipt.synced:
                sync_file(path)  # made with --no-sync, published without
            self.halt.check()
            with explained(path):
                os.utime(staging.ready)  # still here: see _wait

    def _commit(self) -> None:
        """Renames. Onto an empty directory that works, onto one with content it fails (POSIX rename)."""
        ready, out = self.staging.ready, self.goal.out
        check_place(self.goal.plan.files(), out, overwrite=self.overwrite)
        try:
            if is_free(out):
                mode = out.stat().st_mode if out.exists() else None
                ready.rename(out)
                if mode is not None and out.stat().st_mode != mode:
                    out.chmod(mode)
            elif not exchange(ready, out):
                _replace(ready, out, self.staging.old)
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
            raise OutputError(
                "output-exists",
                f"cannot publish: {error.strerror}",
                where=str(out),
                hint="choose another path, or remove it first; the same command then publishes what is made",
            ) from error


def _strange(staging: Staging, wanted: set[str]) -> Iterator[ShardmergeError]:
    """Yields an error for every file that is missing, and for every one that is not planned."""
    ready = staging.ready
    found = {path.relative_to(ready).as_posix() for path in files_below(ready)}
    for name in sorted(wanted ^ found):
        what = "a file is missing in the result" if name in wanted else "the result holds a file that is not planned"
        yield VerificationError("part-differs", what, where=str(staging.model / name), hint="start again with --fresh")


def _replace(ready: Path, out: Path, old: Path) -> None:
    """Puts one directory in the place of another where the system cannot exchange them: there is a gap."""
    out.rename(old)
    try:
        ready.rename(out)
    except OSError:
        old.rename(out)
        raise


def _take_after(ready: Path, out: Path) -> None:
    """Gives a directory the owner, the mode and the access list of the empty one whose place it takes.

    It stays writable for its owner for now: only such a directory can be moved to another (rename(2)).
    """
    there, here = out.stat(), ready.stat()
    with explained(out):
        if (there.st_uid, there.st_gid) != (here.st_uid, here.st_gid):
            os.chown(ready, there.st_uid, there.st_gid)
        with suppress(OSError):  # a file system without them
            for name in os.listxattr(out):
                os.setxattr(ready, name, os.getxattr(out, name))
        if there.st_mode != here.st_mode:
            ready.chmod(there.st_mode | stat.S_IRWXU)


def unconfirmed(out: Path, found: str) -> PublishedError:
    """Returns the error of a result that is there, and may not survive a power cut."""
    return PublishedError(
        "durability-unconfirmed",
        "the result is published and whole, but it is not confirmed that it survives a power cut",
        where=str(out),
        found=found,
        hint="run `sync`; the same command then says that there is nothing left to do, and tidies up",
    )


def _not_tidied(where: str, found: str) -> PublishedError:
    return PublishedError(
        "not-tidied",
        "the result is published and whole, but temporary files could not be removed",
        where=where,
        found=found,
        hint="remove that directory",
    )
