"""The CRC-32 of source records, compared while their bytes stream by.

A torch zip carries one for every storage, and torch itself never looks at it: a flipped bit loads. Bytes are summed as
they are read, in whatever order and by whichever worker, and the sums joined where they meet. What a run reads in
pieces that are too short for that (columns of a matrix), or leaves out (the padding of a partition), is read at its
end.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.errors import CheckpointError
from shardmerge.execute.checksum import combine, crc32
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.tensors import Record

# Read at a time at the end of a run.
_BLOCK = 1 << 20


def no_records(file: SourceFile) -> Iterable[Record]:
    """Says that a file has no records with checksums."""
    return ()


ReadRecords: TypeAlias = Callable[[SourceFile], Iterable[Record]]


@dataclass(frozen=True, slots=True)
class RecordCounts:
    """What became of the checksums of the records that a run read from.

    Attributes
    ----------
    checked, checked_bytes
        Records, and bytes in them, that have the checksum of their archive.
    without
        Records whose archive has no checksum.
    partly
        Records of which less than half was needed, and more than a MiB was not: they were not read whole, so nothing
        was compared.
    """

    checked: int = 0
    checked_bytes: int = 0
    without: int = 0
    partly: int = 0

    def unchecked(self) -> Iterator[str]:
        """Yields in words what was not compared."""
        if self.without:
            yield f"{self.without:,} source record(s): written without a CRC-32"
        if self.partly:
            yield f"{self.partly:,} source record(s): less than half of each is needed, so they were not read whole"


class _Table:
    """The records of one file, 20 bytes each: of 1,024 ranks there may be a million."""

    def __init__(self, records: Iterable[Record]) -> None:
        ordered = sorted((record.offset, record.nbytes, record.crc32) for record in records if record.nbytes)
        self.starts = array("Q", (one[0] for one in ordered))
        self.sizes = array("Q", (one[1] for one in ordered))
        self.sums = array("I", (one[2] for one in ordered))

    def find(self, offset: int) -> int | None:
        """Returns the record that a byte lies in."""
        index = bisect_right(self.starts, offset) - 1
        return index if index >= 0 and offset < self.starts[index] + self.sizes[index] else None


@dataclass(slots=True)
class _Spans:
    """What of a record was read: ranges apart from each other, with their checksums; None while one is summed.

    What was only skimmed has none: its bytes are counted, those that are read twice twice.
    """

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    sums: list[int | None] = field(default_factory=list)
    skimmed: int = 0
    done: bool = False

    def claim(self, low: int, high: int) -> list[tuple[int, int]]:
        """Notes a range as read, and returns what of it was not before."""
        new = []
        index = bisect_right(self.starts, low)
        cursor = max(low, self.ends[index - 1]) if index else low
        while cursor < high:
            stop = min(self.starts[index], high) if index < len(self.starts) else high
            if stop > cursor:
                new.append((cursor, stop))
                self.starts.insert(index, cursor)
                self.ends.insert(index, stop)
                self.sums.insert(index, None)
                index += 1
            if stop == high:
                break
            cursor = self.ends[index]
            index += 1
        return new

    def fill(self, low: int, checksum: int) -> None:
        """Sets the checksum of a range that was noted, and joins it with those beside it."""
        index = bisect_left(self.starts, low)
        self.sums[index] = checksum
        self._join(index)
        if index:
            self._join(index - 1)

    def _join(self, index: int) -> None:
        if index + 1 == len(self.starts) or self.ends[index] != self.starts[index + 1]:
            return
        first, second = self.sums[index], self.sums[index + 1]
        if first is not None and second is not None:
            self.sums[index] = combine(first, second, self.ends[index + 1] - self.starts[index + 1])
            self.ends[index] = self.ends[index + 1]
            del self.starts[index + 1], self.ends[index + 1], self.sums[index + 1]

    def covered(self) -> int:
        """Returns the bytes that were read."""
        return sum(self.ends) - sum(self.starts)


class RecordChecks:
    """Sums what is read of records, and compares.

    Parameters
    ----------
    read
        Gives the records of a file that was opened.
    """

    def __init__(self, read: ReadRecords) -> None:
        self._read = read
        self._tables: dict[str, _Table] = {}
        self._spans: dict[tuple[str, int], _Spans] = {}
        self._lock = threading.Lock()

    def opened(self, file: SourceFile) -> None:
        """Reads where the records of a file lie, the first time that it is opened."""
        if file.path not in self._tables:
            self._tables[file.path] = _Table(self._read(file))

    def seen(self, path: str, offset: int, data: memoryview) -> None:
        """Takes note of bytes that were read, all of one record.

        Raises
        ------
        CheckpointError
            ``damaged-record``: these were the last bytes of a record, which has another checksum.
        """
        table = self._tables.get(path)
        index = table.find(offset) if table is not None else None
        if table is None or index is None or not table.sums[index]:
            self._note_without(table, path, index)
            return
        with self._lock:
            spans = self._spans.setdefault((path, index), _Spans())
            new = [] if spans.done else spans.claim(offset, offset + len(data))
        for low, high in new:
            checksum = crc32(data[low - offset : high - offset])
            with self._lock:
                spans.fill(low, checksum)
                whole = len(spans.starts) == 1 and spans.ends[0] - spans.starts[0] == table.sizes[index]
                spans.done = spans.done or (whole and spans.sums[0] is not None)
            if spans.done:
                self._compare(table, path, index, spans)

    def skimmed(self, path: str, offset: int, nbytes: int) -> None:
        """Takes note of bytes of one record that were read in pieces too short to be summed."""
        table = self._tables.get(path)
        index = table.find(offset) if table is not None else None
        if index is not None:
            with self._lock:
                self._spans.setdefault((path, index), _Spans()).skimmed += nbytes

    def finish(self, pool: FilePool) -> RecordCounts:
        """Reads what is missing of records of which most was read, and tells what was compared.

        Raises
        ------
        CheckpointError
            ``damaged-record``; and what reading raises.
        """
        checked = checked_bytes = without = partly = 0
        for (path, index), spans in self._spans.items():
            table = self._tables[path]
            size = table.sizes[index]
            if not table.sums[index]:
                without += 1
                continue
            used = min(spans.covered() + spans.skimmed, size)
            if not spans.done and size - used <= max(used, _BLOCK):
                self._complete(pool, path, table.starts[index], size, spans)
            partly += not spans.done
            checked += spans.done
            checked_bytes += size if spans.done else 0
        return RecordCounts(checked, checked_bytes, without, partly)

    def _note_without(self, table: _Table | None, path: str, index: int | None) -> None:
        if table is not None and index is not None:
            with self._lock:
                self._spans.setdefault((path, index), _Spans())

    def _complete(self, pool: FilePool, path: str, start: int, size: int, spans: _Spans) -> None:
        buffer = memoryview(bytearray(min(_BLOCK, size)))
        gaps = list(zip([start, *spans.ends], [*spans.starts, start + size], strict=True))
        for low, high in gaps:
            for at in range(low, high, _BLOCK):
                pool.read_into(path, at, buffer[: min(_BLOCK, high - at)])  # and comes by `seen`

    def _compare(self, table: _Table, path: str, index: int, spans: _Spans) -> None:
        found, expected = spans.sums[0], table.sums[index]
        if found == expected:
            return
        low, high = table.starts[index], table.starts[index] + table.sizes[index]
        with SourceFile(path) as file:
            name = next((record.name for record in self._read(file) if record.offset == low), "")
        raise CheckpointError(
            "damaged-record",
            "the bytes of a record are not those that its checksum in the file was made of",
            where=f"{path}, bytes {low} to {high} ({name})",
            found=f"CRC-32 {found:08x}",
            expected=f"{expected:08x}",
            hint="the disk or a copy damaged the file: copy or download it again, or take an earlier checkpoint",
        )
