"""Makes a part and commits it: written under a name of its own, synced, sealed, renamed, and then its receipt."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from shardmerge.errors import InterruptedRunError, OutputError, ShardmergeError
from shardmerge.execute.engine import Counters, Workshop
from shardmerge.execute.executors.contract import Stopped
from shardmerge.execute.means import Means
from shardmerge.execute.pins import Pins
from shardmerge.plan.value import Part
from shardmerge.publish.part_receipts import PartReceipt, receipt_bytes, receipt_from, receipt_of, unfit
from shardmerge.publish.staging import Staging, inode
from shardmerge.storage.writing import explained
from shardmerge.system_errors import read_small


@dataclass(frozen=True)
class PartMaker:
    """Makes parts for a staging directory: see ``execute.executors.contract.Make``.

    Two makers of one part lose time and nothing else: each writes a file of its own, and their bytes are equal.

    Attributes
    ----------
    staging
        Where parts gather.
    means
        With what they are made.
    pins
        Of the files that are read, as they were looked at before; without, the first part looks.
    """

    staging: Staging
    means: Means
    pins: Pins | None = None
    _shops: dict[int, Workshop] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[type[PartMaker], tuple[Staging, Means]]:
        """A copy, maybe on another machine, looks at the files itself."""
        return PartMaker, (self.staging, self.means)

    def __call__(self, part: Part, counters: Counters, stopped: Stopped) -> None:
        """Makes and commits a part.

        Raises
        ------
        ShardmergeError
            As ``execute.engine.Workshop.make``; the part then counts as not made.
        OutputError
            ``staging-gone``.
        """
        home = inode(self.staging.parts)
        try:
            self._commit(part, counters, stopped)
        except InterruptedRunError:
            raise
        except ShardmergeError as error:
            taken = not self.staging.model.exists() or inode(self.staging.parts) != home
            if taken and is_made(self.staging, part):  # by somebody who is about to publish it
                return
            if home is not None and inode(self.staging.parts) == home:
                raise
            raise OutputError(
                "staging-gone",
                "another process removed the unfinished files of this run",
                where=str(self.staging.root),
                found=error.what,
                hint="the same command starts again; use `shardmerge clean` and --fresh only while nothing else writes",
            ) from error

    def _commit(self, part: Part, counters: Counters, stopped: Stopped) -> None:
        began, started = time.time(), time.monotonic()
        temporary = self.staging.temporary(f"{part.number:05d}")
        final = self.staging.model / part.shard.name
        try:
            outcome = self._workshop(part).make(part, temporary, counters, stopped)
            seconds = time.monotonic() - started
            receipt = receipt_of(part, temporary, outcome, synced=self.means.sync, began=began, seconds=seconds)
            make_folders(self.staging.model, part.shard.name)
            with explained(final):
                temporary.rename(final)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            self.close()  # whoever catches the error keeps all it came through
            raise
        self.staging.settle(final)  # before the receipt that says so
        committed = receipt_path(self.staging, part.number)
        self.staging.place(committed, receipt_bytes(receipt, part))
        self.staging.settle(committed)

    def close(self) -> None:
        """Closes the files that this process read, if no thread is at work any more."""
        shop = self._shops.pop(os.getpid(), None)
        if shop is not None:
            shop.close()

    def _workshop(self, part: Part) -> Workshop:
        """One for each process: what is open here is of no use to one that was forked."""
        if self._shops.get(os.getpid()) is None:
            self._shops[os.getpid()] = Workshop(self.means, self.pins or Pins(part.files))
        return self._shops[os.getpid()]


def make_folders(root: Path, name: str) -> None:
    """Makes the directories of a path inside of ``root``, and never ``root``: if it is gone, it was published."""
    with explained(root / name):
        for folder in reversed(PurePosixPath(name).parents[:-1]):
            (root / folder).mkdir(exist_ok=True)


def receipt_path(staging: Staging, number: int) -> Path:
    """Returns where the receipt of a part is."""
    return staging.parts / f"{number:05d}.json"


def read_receipt(staging: Staging, part: Part) -> PartReceipt | None:
    """Returns the receipt of a part, or None where there is none. The file is opened by its name and nothing else.

    Raises
    ------
    OSError
        The system refused: to take the part for one that is not made would end a run of all parts as one of some.
    """
    try:
        data = read_small(receipt_path(staging, part.number))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return receipt_from(data, part)


def is_made(staging: Staging, part: Part, *, recheck: bool = False) -> bool:
    """Tells whether a part has a receipt, and is what that says, also where somebody is about to publish it."""
    receipt = read_receipt(staging, part)
    if receipt is None:
        return False
    homes = (staging.model, *staging.claimed())
    return any(not unfit(receipt, part.shard, home / part.shard.name, recheck=recheck) for home in homes)
