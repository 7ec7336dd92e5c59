"""SHA-256 of a file of weights and of every tensor in it.

CRC-32 of tiles can be joined in any order; SHA-256 needs all bytes from front to back. So while a part is made, its
bytes are read back behind the threads that write it, while they are in the page cache. What was read back must have the
CRC-32 of what was handed to the system: the digests are those of the bytes that were made.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from threading import Lock

from shardmerge.errors import OutputError
from shardmerge.execute.checksum import crc32
from shardmerge.execute.frames import frame_crc32
from shardmerge.plan.memory import READ_BACK
from shardmerge.plan.shard import PlannedShard
from shardmerge.storage.writing import OutputFile

# Fills a buffer from a byte of the file on.
Read = Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True)
class Sums:
    """CRC-32 and SHA-256 (hex) of some bytes; ``""`` where no SHA-256 was asked for."""

    crc32: int
    sha256: str


_OF_NOTHING = Sums(0, hashlib.sha256().hexdigest())


class Digester:
    """Takes the sums of a file and of the tensors in it, from front to back.

    Parameters
    ----------
    size
        Of the file, in bytes.
    tensors
        Offset, bytes and name of each, in the order of the file.
    read
        Gives the bytes.
    each
        Whether every tensor gets a SHA-256 of its own.

    Attributes
    ----------
    at
        How many bytes were read.
    frame_crc32
        Of all bytes that are no tensor's, one after the other.
    """

    def __init__(self, size: int, tensors: Iterable[tuple[int, int, str]], read: Read, *, each: bool = True) -> None:
        self._read = read
        self._each = each
        self._buffer = memoryview(bytearray(READ_BACK))
        self._ranges = _ranges(size, tensors)
        self._file = hashlib.sha256()
        self._tensor = hashlib.sha256()
        self._name: str | None = None
        self._crc = 0
        self._end = 0
        self._sums: dict[str, Sums] = {}
        self.at = 0
        self.frame_crc32 = 0

    @classmethod
    def of_shard(cls, shard: PlannedShard, read: Read) -> Digester:
        """Returns what takes the sums of a planned file."""
        return cls(shard.nbytes, ((one.offset, one.nbytes, one.name) for one in shard.tensors), read)

    @property
    def sha256(self) -> str:
        """Of all bytes so far, in hexadecimal."""
        return self._file.hexdigest()

    def of(self, name: str) -> Sums:
        """Returns the sums of a tensor, once its end was read."""
        return self._sums.get(name, _OF_NOTHING if self._each else Sums(0, ""))

    def step(self, stop: int) -> int:
        """Reads the next bytes, at most up to ``stop``, and returns how many."""
        if self.at == self._end:
            self._begin()
        data = self._buffer[: min(stop, self._end) - self.at]
        self._read(self.at, data)
        self._file.update(data)
        if self._name is not None and self._each:
            self._tensor.update(data)
        self._crc = crc32(data, self._crc)
        self.at += len(data)
        if self.at == self._end:
            self._note()
        return len(data)

    def _begin(self) -> None:
        self._end, self._name = next(self._ranges)
        self._crc = self.frame_crc32 if self._name is None else 0
        self._tensor = hashlib.sha256()

    def _note(self) -> None:
        if self._name is None:
            self.frame_crc32 = self._crc
        else:
            self._sums[self._name] = Sums(self._crc, self._tensor.hexdigest() if self._each else "")


def _ranges(size: int, tensors: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, str | None]]:
    """Yields where each tensor ends, and what is between them, which has no name."""
    cursor = 0
    for offset, nbytes, name in tensors:
        if not nbytes:
            continue
        if offset > cursor:
            yield offset, None
        cursor = offset + nbytes
        yield cursor, name
    if size > cursor:
        yield size, None


def taken(
    found: Digester, shard: PlannedShard, path: Path, checksums: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the SHA-256 of every tensor and of the file, by name.

    Parameters
    ----------
    found
        What was read of the file.
    shard, path
        What was to be written, and where.
    checksums
        CRC-32 of the tensors' bytes as they were made, but for cloned ones.

    Raises
    ------
    OutputError
        ``output-changed``: what was read has another CRC-32 than what was written.
    """
    if found.at != shard.nbytes:
        raise _changed(path, f"all from byte {found.at} on")
    for name, checksum in checksums.items():
        if found.of(name).crc32 != checksum:
            raise _changed(path, f"tensor {name}")
    if found.frame_crc32 != frame_crc32(shard, checksums):
        raise _changed(path, "the header")
    return {one.name: found.of(one.name).sha256 for one in shard.tensors}, {shard.name: found.sha256}


def _changed(path: Path, what: str) -> OutputError:
    return OutputError(
        "output-changed",
        "what was written to a file and what is read back from it differ",
        where=str(path),
        found=what,
        hint="another process writes to this file, or the disk loses bytes: run the same command again with --recheck",
    )


class Follower:
    """Takes the sums of a file behind the threads that write it: whichever moves the frontier reads back up to it.

    Two ranges of the file are written when all else is there: the first bytes, and the CRC-32 fields of a torch file,
    each of which lies behind its tensor. They are put into what is read back.

    Attributes
    ----------
    digester
        What takes them.
    """

    def __init__(self, shard: PlannedShard, file: OutputFile) -> None:
        self.digester = Digester.of_shard(shard, self._read)
        self._file = file
        self._first = shard.blobs[0][1][:8]
        self._fields = sorted((at, name) for name, places in shard.checksums.items() for at in places)
        self._written: deque[tuple[int, int]] = deque()
        self._ahead: list[tuple[int, int]] = []
        self._frontier = 0
        self._baton = Lock()

    def wrote(self, offset: int, nbytes: int) -> None:
        """Notes a range that was written."""
        self._written.append((offset, offset + nbytes))

    def follow(self, going: Callable[[], bool]) -> None:
        """Reads back up to the frontier, unless another thread is at it, which then does that too."""
        while self._written and going() and self._baton.acquire(blocking=False):
            try:
                self._move()
                while self.digester.at < self._frontier and going():
                    self.digester.step(self._frontier)
            finally:
                self._baton.release()

    def _move(self) -> None:
        """Moves the frontier to the first byte that is not written yet."""
        while self._written:
            heappush(self._ahead, self._written.popleft())
        while self._ahead and self._ahead[0][0] <= self._frontier:
            self._frontier = max(self._frontier, heappop(self._ahead)[1])

    def _read(self, offset: int, out: memoryview) -> None:
        self._file.read_back(offset, out)
        _put(self._first, 0, offset, out)
        low = bisect_left(self._fields, (offset - 3, ""))
        for at, name in self._fields[low : bisect_left(self._fields, (offset + len(out), ""))]:
            _put(self.digester.of(name).crc32.to_bytes(4, "little"), at, offset, out)


def _put(value: bytes, at: int, offset: int, out: memoryview) -> None:
    """Copies what of a value that belongs at one place lies in a buffer that begins at another."""
    low, high = max(at, offset), min(at + len(value), offset + len(out))
    if low < high:
        out[low - offset : high - offset] = value[low - at : high - at]
