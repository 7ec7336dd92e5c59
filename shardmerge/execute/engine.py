"""Makes one part of a plan: threads take tasks in the order of the sources and write at final offsets.

What threads share is the queue of tasks and the file they write; each has a pool of open files, buffers, sums and a
counter of its own. So nothing is locked per tile, and the sums are joined once, when the part is done.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, OutputError, ResourceError
from shardmerge.execute.checksum import joined
from shardmerge.execute.cloning import clone_shard
from shardmerge.execute.digests import Follower, taken
from shardmerge.execute.means import Means
from shardmerge.execute.patience import GRACE, begin, interrupted
from shardmerge.execute.pins import Pins
from shardmerge.execute.products import one_thread_for
from shardmerge.execute.records import RecordSums, RecordTables, joined_sums
from shardmerge.execute.worker import Worker
from shardmerge.plan.clones import Clone, overlapping
from shardmerge.plan.shard import PlannedShard, PlannedTensor, is_copy
from shardmerge.plan.tasks import Task, batches, front_to_back
from shardmerge.plan.value import Part
from shardmerge.storage.limits import return_freed_memory
from shardmerge.storage.writing import OutputFile

# Bytes done so far, one number a thread: each writes its own, and whoever wants to know adds them up.
Counters: TypeAlias = "memoryview[int] | list[int]"

# How often whoever waits for threads looks whether they should stop, in seconds.
_LOOK = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done to make a part, or all of them.

    Attributes
    ----------
    overflows
        Finite values that became infinite (or NaN, in types without infinities), by tensor; only those with any.
    checksums
        CRC-32 of each tensor's bytes in the output, but for those of which something was cloned: nobody saw the bytes.
    bytes_read, reads
        Data read from the sources, in bytes and calls.
    bytes_written
        Data written to the shards.
    cloned
        The source file of each tensor of which something was cloned, and where in it the tensor begins, in bytes.
    bytes_cloned
        Bytes of the shards that are shared with the sources.
    clone_seconds
        What cloning them took; the kernel first writes out what of the sources is not on the disk yet.
    records
        What was read of records that carry checksums.
    digests, file_digests
        SHA-256 (hex) of each tensor and of each file, by name, where that was asked for: all of them, or none.
    """

    overflows: dict[str, int]
    checksums: dict[str, int]
    bytes_read: int
    reads: int
    bytes_written: int
    cloned: dict[str, tuple[str, int]] = field(default_factory=dict)
    bytes_cloned: int = 0
    clone_seconds: float = 0.0
    records: tuple[RecordSums, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)
    file_digests: dict[str, str] = field(default_factory=dict)


class Workshop:
    """Makes parts, one after the other, with what is worth keeping between them: open files and buffers.

    Parameters
    ----------
    means
        With what.
    pins
        Of the files that are read.
    """

    def __init__(self, means: Means, pins: Pins) -> None:
        self._means = means
        self._pins = pins
        self._tables = RecordTables(means.records)
        self._workers = [Worker(means, self._pins, self._tables) for _ in range(means.threads)]
        self._busy = False
        return_freed_memory()

    def close(self) -> None:
        """Closes the files, unless a thread still uses them: one that was stopped and waits for the disk."""
        if not self._busy:
            for worker in self._workers:
                worker.pool.close()

    def make(self, part: Part, path: Path, counters: Counters, stopped: Callable[[], bool] = bool) -> Outcome:
        """Writes a part as a new file: whole, synced and sealed when this returns.

        Parameters
        ----------
        part, path
            What to make, and where.
        counters
            One number a thread, counted up by the bytes of each tile.
        stopped
            Asked every tenth of a second while threads work; once it says yes the part is given up.

        Raises
        ------
        CheckpointError
            ``source-changed``: a source file is not the one that was planned with. ``damaged-record``: the bytes of a
            record do not have its checksum.
        ResourceError, OutputError
            From the writing side. ``output-changed``: what was read back for its digest is not what was written.
        InterruptedRunError
            ``interrupted``: ``stopped`` said so.
        """
        self._busy = True
        try:
            return self._made(part, path, counters, stopped)
        finally:
            self._busy = any(worker.thread is not None and worker.thread.is_alive() for worker in self._workers)

    def _made(self, part: Part, path: Path, counters: Counters, stopped: Callable[[], bool]) -> Outcome:
        means = self._means
        file = OutputFile(path, part.shard.nbytes, sync=means.sync, bounded=means.bounded, read_back=means.sha256)
        for worker in self._workers:
            worker.begin(self._tables)
        try:
            with one_thread_for(tensor.entry for tensor in part.shard.tensors):
                outcome = _Making(part.shard, file, means, self._workers, counters, stopped).made()
        except (CheckpointError, OutputError):  # writing from a map of a file that shrank: EFAULT
            self._pins.check()  # that a file was changed says more than what is wrong with it now
            raise
        finally:
            file.abandon()
        self._pins.check_opened()
        return outcome


class _Making:
    """One part under way."""

    def __init__(  # a part, and all it is made with
        self,
        shard: PlannedShard,
        file: OutputFile,
        means: Means,
        workers: Sequence[Worker],
        counters: Counters,
        stopped: Callable[[], bool],
    ) -> None:
        self._shard = shard
        self._file = file
        self._means = means
        self._workers = workers
        self._counters = counters
        self._stopped = stopped
        self._follower = Follower(shard, file) if means.sha256 else None
        self._queue: deque[list[Task]] = deque()
        self._failure: BaseException | None = None

    def made(self) -> Outcome:
        """Makes the part; see ``Workshop.make``."""
        for offset, blob in self._shard.blobs:
            reserved = max(8 - offset, 0)  # written last: see OutputFile
            self._file.write(offset + reserved, memoryview(blob)[reserved:])
            self._wrote(offset, len(blob))
        started = time.monotonic()
        cloned = clone_shard(self._shard, self._file, self._workers[0].pool)
        clone_seconds = time.monotonic() - started
        for one in cloned:
            self._counters[0] += one.nbytes
            self._wrote(one.offset, one.nbytes)
        made = batches(self._shard, self._means.tile, cloned)
        self._queue.extend(front_to_back(made) if self._follower else made)
        self._run_threads()
        return self._outcome(cloned, clone_seconds)

    def _wrote(self, offset: int, nbytes: int) -> None:
        if self._follower is not None:
            self._follower.wrote(offset, nbytes)

    def _follow(self) -> None:
        if self._follower is not None:
            self._follower.follow(lambda: self._failure is None)

    def _run_threads(self) -> None:
        """Lets threads work until the queue is empty, or this one is told to stop."""
        threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(self._means.threads)]
        for worker, thread in zip(self._workers, threads, strict=True):
            worker.thread = thread
        try:
            started = list(self._started(threads))
            deadline = math.inf
            for thread in started:
                while thread.is_alive() and time.monotonic() < deadline:
                    thread.join(_LOOK)
                    if self._failure is None and self._stopped():
                        self._failure, deadline = interrupted(), time.monotonic() + GRACE
        except BaseException as error:  # Ctrl-C, where nobody else waits for signals
            self._failure = error
            raise
        if self._failure is not None:
            raise self._failure

    def _started(self, threads: Sequence[threading.Thread]) -> Iterator[threading.Thread]:
        """Starts threads, and yields them. Where one cannot be, the others are to end, and are waited for too."""
        for thread in threads:
            try:
                begin(thread)
            except ResourceError as error:
                self._failure = error
                return
            yield thread

    def _work(self, number: int) -> None:
        """Takes tasks until there are none, or another thread failed."""
        worker, counters = self._workers[number], self._counters

        def done(nbytes: int) -> bool:
            counters[number] += nbytes
            return self._failure is None

        try:
            while self._queue:
                try:
                    batch = self._queue.popleft()
                except IndexError:  # another thread took the last one
                    break
                if not worker.carry(batch, self._file, done):
                    return
                for task in batch:
                    self._wrote(task.offset, task.nbytes)
                self._follow()
            self._follow()  # where all was cloned, there were no tasks
        except BaseException as error:  # noqa: BLE001  # whatever happens in a thread must reach the caller
            self._failure = self._failure or error

    def _outcome(self, cloned: Sequence[Clone], clone_seconds: float) -> Outcome:
        """Joins what the threads found, and seals the file."""
        records = joined_sums((one for worker in self._workers for one in worker.notes.sums()), self._means.records)
        places = dict(_cloned_places(self._shard, cloned))
        checksums = self._checksums(places)
        digests, file_digest = self._digests(checksums)
        for name, offsets in self._shard.checksums.items():
            for offset in offsets:
                self._file.write(offset, memoryview(checksums[name].to_bytes(4, "little")))
        self._file.seal(self._shard.blobs[0][1][:8])
        overflows: Counter[str] = sum((worker.overflows for worker in self._workers), Counter())
        return Outcome(
            dict(overflows),
            checksums,
            sum(worker.pool.bytes_read for worker in self._workers),
            sum(worker.pool.reads for worker in self._workers),
            sum(worker.written for worker in self._workers),
            places,
            sum(one.nbytes for one in cloned),
            clone_seconds,
            records,
            digests,
            file_digest,
        )

    def _digests(self, checksums: dict[str, int]) -> tuple[dict[str, str], dict[str, str]]:
        """The SHA-256 of every tensor and of the file; nothing where none is asked for."""
        if self._follower is None:
            return {}, {}
        return taken(self._follower.digester, self._shard, self._file.path, checksums)

    def _checksums(self, cloned: dict[str, tuple[str, int]]) -> dict[str, int]:
        """The CRC-32 of every tensor of which all bytes were seen."""
        found: dict[str, list[tuple[int, int, int]]] = {
            tensor.name: [] for tensor in self._shard.tensors if tensor.name not in cloned
        }
        for name, *sums in (one for worker in self._workers for one in worker.sums):
            if name in found:
                found[name].append((sums[0], sums[1], sums[2]))
        return {name: joined((nbytes, one) for _, nbytes, one in sorted(sums)) for name, sums in found.items()}


def _cloned_places(shard: PlannedShard, cloned: Sequence[Clone]) -> Iterator[tuple[str, tuple[str, int]]]:
    for tensor in shard.tensors if cloned else ():
        for one in overlapping(tensor, cloned):
            yield tensor.name, (one.file, one.start + tensor.offset - one.offset)


def preload(tensors: Sequence[PlannedTensor]) -> None:
    """Imports what making some tensors needs, so that processes forked afterwards share it."""
    if not all(is_copy(tensor.entry) for tensor in tensors):
        from shardmerge.execute import making, regions  # noqa: F401
