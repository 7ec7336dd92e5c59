"""The CRC-32 of source records, compared while their bytes stream by.

A torch zip carries one for every storage, and torch itself never looks at it: a flipped bit loads. Bytes are summed as
they are read, in whatever order; each thread notes its own sums, and a part's are kept in its receipt. Joined where
they meet they are compared with the archive's, within a part as soon as it is made, over all parts before the result is
published. What a run reads in pieces that are too short for that (columns of a matrix), or leaves out (the padding of a
partition), is read at its end.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.errors import CheckpointError
from shardmerge.execute.checksum import combine, crc32
from shardmerge.storage.packed import source_opener
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.tensors import Record

# Read at a time at the end of a run.
_BLOCK = 1 << 20

# Code of the error of a record whose bytes have another checksum.
DAMAGED = "damaged-record"


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


@dataclass(frozen=True, slots=True)
class RecordSums:
    """What one thread, or one part, read of a record.

    Attributes
    ----------
    file
        Absolute path of the archive.
    offset, nbytes, crc32
        Of the record: where it lies, and what the archive says; 0 where it was written without.
    sums
        (start, end, CRC-32) of ranges that were read, in bytes of the file, ascending and apart from each other.
    skimmed
        Bytes that were read without being summed; those that were read twice count twice.
    """

    file: str
    offset: int
    nbytes: int
    crc32: int
    sums: tuple[tuple[int, int, int], ...]
    skimmed: int = 0


class RecordTables:
    """The records of the files that a process reads, 20 bytes each: of 1,024 ranks there may be a million.

    Parameters
    ----------
    read
        Gives the records of a file that was opened.
    """

    def __init__(self, read: ReadRecords) -> None:
        self._read = read
        self._tables: dict[str, _Table] = {}

    def opened(self, file: SourceFile) -> None:
        """Reads where the records of a file lie, the first time that it is opened."""
        if file.path not in self._tables:
            self._tables[file.path] = _Table(self._read(file))

    def find(self, path: str, offset: int) -> tuple[int, int, int] | None:
        """Returns start, bytes and CRC-32 of the record that a byte of a file lies in; None where there is none."""
        table = self._tables.get(path)
        return None if table is None else table.find(offset)


class _Table:
    def __init__(self, records: Iterable[Record]) -> None:
        ordered = sorted((record.offset, record.nbytes, record.crc32) for record in records if record.nbytes)
        self._starts = array("Q", (one[0] for one in ordered))
        self._sizes = array("Q", (one[1] for one in ordered))
        self._sums = array("I", (one[2] for one in ordered))

    def find(self, offset: int) -> tuple[int, int, int] | None:
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or offset >= self._starts[index] + self._sizes[index]:
            return None
        return self._starts[index], self._sizes[index], self._sums[index]


@dataclass(slots=True)
class _Spans:
    """What of a record was read: ranges apart from each other, with their checksums."""

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    skimmed: int = 0

    def missing(self, low: int, high: int) -> list[tuple[int, int]]:
        """Returns what of a range was not read yet."""
        found = []
        index = bisect_right(self.starts, low)
        cursor = max(low, self.ends[index - 1]) if index else low
        while cursor < high:
            stop = min(self.starts[index], high) if index < len(self.starts) else high
            if stop > cursor:
                found.append((cursor, stop))
            if stop == high:
                break
            cursor = self.ends[index]
            index += 1
        return found

    def add(self, low: int, high: int, checksum: int) -> None:
        """Notes a range that was not read before, and joins it with those beside it."""
        index = bisect_left(self.starts, low)
        self.starts.insert(index, low)
        self.ends.insert(index, high)
        self.sums.insert(index, checksum)
        self._join(index)
        if index:
            self._join(index - 1)

    def _join(self, index: int) -> None:
        if index + 1 < len(self.starts) and self.ends[index] == self.starts[index + 1]:
            size = self.ends[index + 1] - self.starts[index + 1]
            self.sums[index] = combine(self.sums[index], self.sums[index + 1], size)
            self.ends[index] = self.ends[index + 1]
            del self.starts[index + 1], self.ends[index + 1], self.sums[index + 1]

    def covered(self) -> int:
        """Returns the bytes that were read and summed."""
        return sum(self.ends) - sum(self.starts)

    def rows(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(zip(self.starts, self.ends, self.sums, strict=True))


class RecordNotes:
    """Sums what one thread reads of records. No other thread touches it, so nothing here takes a lock."""

    def __init__(self, tables: RecordTables) -> None:
        self._tables = tables
        self._spans: dict[tuple[str, int, int, int], _Spans] = {}

    def seen(self, path: str, offset: int, data: memoryview) -> None:
        """Takes note of bytes that were read, all of one record."""
        spans = self._of(path, offset)
        if spans is not None:
            for low, high in spans.missing(offset, offset + len(data)):
                spans.add(low, high, crc32(data[low - offset : high - offset]))

    def skimmed(self, path: str, offset: int, nbytes: int) -> None:
        """Takes note of bytes of one record that were read in pieces too short to be summed."""
        spans = self._of(path, offset)
        if spans is not None:
            spans.skimmed += nbytes

    def sums(self) -> Iterator[RecordSums]:
        """Yields what was noted."""
        for record, spans in self._spans.items():
            yield RecordSums(*record, spans.rows(), spans.skimmed)

    def _of(self, path: str, offset: int) -> _Spans | None:
        record = self._tables.find(path, offset)
        if record is None:
            return None
        spans = self._spans.setdefault((path, *record), _Spans())
        return spans if record[2] else None  # without a checksum there is nothing to compare


def joined_sums(found: Iterable[RecordSums], read: ReadRecords) -> tuple[RecordSums, ...]:
    """Returns the sums of several threads or parts as those of one.

    Where two read the same bytes the sums of one are taken, if they do not overlap with others by a part: the sum of a
    part of a range cannot be told from that of the whole, and such a range counts as not read.

    Raises
    ------
    CheckpointError
        ``damaged-record``: a record that is whole has another checksum.
    """
    merged: dict[tuple[str, int, int, int], _Spans] = {}
    for one in found:
        spans = merged.setdefault((one.file, one.offset, one.nbytes, one.crc32), _Spans())
        spans.skimmed += one.skimmed
        for low, high, checksum in one.sums:
            if spans.missing(low, high) == [(low, high)]:
                spans.add(low, high, checksum)
    for (file, offset, nbytes, expected), spans in merged.items():
        if expected and spans.covered() == nbytes and spans.sums != [expected]:
            raise _damaged(file, offset, nbytes, spans.sums[0], expected, read)
    return tuple(RecordSums(*record, spans.rows(), spans.skimmed) for record, spans in merged.items())


def compare_records(found: Iterable[RecordSums], pool: FilePool, read: ReadRecords) -> RecordCounts:
    """Reads what is missing of records of which most was read, compares, and tells what was compared.

    Raises
    ------
    CheckpointError
        ``damaged-record``; and what reading raises.
    """
    checked = checked_bytes = without = partly = 0
    for one in joined_sums(found, read):
        if not one.crc32:
            without += 1
            continue
        used = min(sum(high - low for low, high, _ in one.sums) + one.skimmed, one.nbytes)
        if one.nbytes - used > max(used, _BLOCK):
            partly += 1
            continue
        joined_sums([one, *_rest(one, pool)], read)
        checked += 1
        checked_bytes += one.nbytes
    return RecordCounts(checked, checked_bytes, without, partly)


def _rest(one: RecordSums, pool: FilePool) -> Iterator[RecordSums]:
    """Reads the gaps of a record."""
    end = one.offset + one.nbytes
    buffer = memoryview(bytearray(min(_BLOCK, one.nbytes)))
    starts, ends = [low for low, _, _ in one.sums], [high for _, high, _ in one.sums]
    for low, high in zip([one.offset, *ends], [*starts, end], strict=True):
        for at in range(low, high, _BLOCK):
            data = buffer[: min(_BLOCK, high - at)]
            pool.read_into(one.file, at, data)
            sums = ((at, at + len(data), crc32(data)),)
            yield RecordSums(one.file, one.offset, one.nbytes, one.crc32, sums)


def _damaged(  # the record, and both sides
    file: str, offset: int, nbytes: int, found: int, expected: int, read: ReadRecords
) -> CheckpointError:
    with source_opener()(file) as source:
        name = next((record.name for record in read(source) if record.offset == offset), "")
    return CheckpointError(
        DAMAGED,
        "the bytes of a record do not match its checksum in the file",
        where=f"{file}, bytes {offset} to {offset + nbytes} ({name})",
        found=f"CRC-32 {found:08x}",
        expected=f"{expected:08x}",
        hint="the disk or a copy damaged the file: copy or download it again, or take an earlier checkpoint",
    )
