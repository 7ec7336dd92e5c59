"""What one thread has of its own while parts are made: open files, buffers, and what it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from threading import Thread
from typing import TYPE_CHECKING

from shardmerge.execute.checksum import crc32
from shardmerge.execute.gather import Assembler
from shardmerge.execute.means import Device, Means
from shardmerge.execute.pins import Pins
from shardmerge.execute.records import RecordNotes, RecordTables
from shardmerge.plan.tasks import Task
from shardmerge.storage.packed import source_opener
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.storage.writing import OutputFile

if TYPE_CHECKING:
    from shardmerge.execute.gpu import DeviceCasts


def _casts_on(device: Device) -> DeviceCasts | None:
    if device == "cpu":
        return None
    from shardmerge.execute.gpu import cuda_casts

    return cuda_casts()


class Worker:
    """What one thread has of its own: kept from part to part, but for what it found.

    Attributes
    ----------
    thread
        The thread of the last part, which may still run after a run was stopped.
    """

    thread: Thread | None = None

    def __init__(self, means: Means, pins: Pins, tables: RecordTables) -> None:
        self.pool = FilePool(means.io, bounded=means.bounded, sharers=means.threads, open_file=source_opener())
        self.pool.opened = _both(pins.opened, tables.opened)
        self.assembler = Assembler(self.pool, means.tile, _casts_on(means.device))
        self.begin(tables)

    def begin(self, tables: RecordTables) -> None:
        """Forgets what was found of the part before."""
        self.notes = RecordNotes(tables)
        self.pool.seen, self.pool.skimmed = self.notes.seen, self.notes.skimmed
        self.pool.bytes_read = self.pool.reads = 0
        self.written = 0
        self.overflows: Counter[str] = Counter()
        self.sums: list[tuple[str, int, int, int]] = []  # tensor, offset in the file, bytes, CRC-32; one a task

    def carry(self, batch: Iterable[Task], file: OutputFile, done: Callable[[int], bool]) -> bool:
        """Makes and writes some tasks that share a state; returns whether there may be others."""
        going = all(self._carry(task, file, done) for task in batch)
        self.assembler.forget()
        return going

    def _carry(self, task: Task, file: OutputFile, done: Callable[[int], bool]) -> bool:
        """Makes and writes a task, tile by tile; returns whether there may be another."""
        assembler, tensor, size = self.assembler, task.tensor, task.tensor.dtype.itemsize
        before, checksum = assembler.overflowed, 0
        for start, count in task.tiles():
            data = assembler.view(tensor.entry, start, count)
            file.write(tensor.offset + start * size, data)
            checksum = crc32(data, checksum)
            assembler.release(data)
            del data  # before the next one is made: a band may be 32 MiB
            if not done(count * size):
                return False
        self.written += task.count * size
        self.sums.append((tensor.name, tensor.offset + task.start * size, task.count * size, checksum))
        if assembler.overflowed > before:
            self.overflows[tensor.name] += assembler.overflowed - before
        return True


def _both(first: Callable[[SourceFile], None], second: Callable[[SourceFile], None]) -> Callable[[SourceFile], None]:
    def opened(file: SourceFile) -> None:
        first(file)
        second(file)

    return opened
