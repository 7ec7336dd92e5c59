"""Zstd frames inside files, read by the byte ranges of what they unpack to.

A frame can be unpacked from its beginning alone. So a reader goes on from where it was, and begins anew to go back:
memory is a window and two buffers, whatever the frame unpacks to. Few frames are open at a time, since each open one
keeps its window.
"""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

from shardmerge.errors import CheckpointError
from shardmerge.packed_names import PackedName, packed_name
from shardmerge.storage.reading import SourceFile

if TYPE_CHECKING:
    import zstandard

# Frames with a larger window are refused: RFC 8878 asks of every reader to take 8 MiB. zstd's level 3, which torch
# writes, has 2 MiB.
LARGEST_WINDOW = 8 << 20

# Frames that one reader of many files unpacks side by side: a matrix cut by columns lies in one of each rank.
OPEN_FRAMES = 4

# What an open frame takes beside its window: input, two blocks of 128 KiB, zstd's own tables (96 KB).
PER_FRAME = 1 << 20

# A block of 128 KiB takes at least three bytes of header and one of data.
MOST_RATIO = (128 << 10) // 4

_READ = 128 << 10
_NO_SIZE = 1 << 62  # what a frame unpacks to is known when all of it is unpacked
_MAGIC = b"\x28\xb5\x2f\xfd"
_HEADER = 18
_PIP = "pip install 'shardmerge[zstd]'"


def frame_window(raw: bytes, needed: int, where: str) -> int:
    """Returns the window of the frame that begins with some bytes.

    Parameters
    ----------
    raw
        The first 18 bytes, or all.
    needed
        What it unpacks to at least, in bytes.
    where
        The place, for messages.

    Raises
    ------
    CheckpointError
        ``packed-item``: no frame, a window or a dictionary that is not read, or a frame that says to hold less.
    """
    library = codec(where)
    try:
        said = library.get_frame_parameters(raw[:_HEADER])
    except library.ZstdError as error:
        raise packed_item(where, f"first bytes {raw[:4]!r}", "a zstd frame") from error
    if said.dict_id or raw[:4] != _MAGIC:
        raise packed_item(where, f"a frame of dictionary {said.dict_id}", "one without a dictionary")
    if said.window_size > LARGEST_WINDOW:
        raise packed_item(where, f"a window of {said.window_size:,} bytes", f"at most {LARGEST_WINDOW:,}")
    if said.content_size not in (library.CONTENTSIZE_UNKNOWN, library.CONTENTSIZE_ERROR) and said.content_size < needed:
        raise packed_item(where, f"a frame of {said.content_size:,} bytes", f"at least {needed:,}")
    return int(said.window_size)


def codec(where: str) -> ModuleType:
    """Returns the library that unpacks; raises ``packed-item`` where it is not installed."""
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise CheckpointError(
            "packed-item",
            "the items of this checkpoint are compressed with zstd, and the library that unpacks it is not installed",
            where=where,
            hint=f"{_PIP}; or save again without the extension that compresses",
        ) from error


def packed_item(where: str, found: str, expected: str = "") -> CheckpointError:
    """Returns the error of an item that is not unpacked."""
    return CheckpointError(
        "packed-item",
        "an item of this checkpoint is compressed in a way that is not read",
        where=where,
        found=found,
        expected=expected,
        hint="save again without the extension that compresses",
    )


class Unpackers:
    """The frames that one reader has open; safe for threads."""

    def __init__(self, most: int = OPEN_FRAMES) -> None:
        self.lock = threading.Lock()
        self._most = most
        self._open: OrderedDict[int, PackedFile] = OrderedDict()

    def turn(self, file: PackedFile) -> None:
        """Lets a frame be open, and closes the one that was used longest ago."""
        self._open[id(file)] = file
        self._open.move_to_end(id(file))
        if len(self._open) > self._most:
            self._open.popitem(last=False)[1].rest()

    def gone(self, file: PackedFile) -> None:
        """Forgets a frame that is closed."""
        self._open.pop(id(file), None)


class PackedFile(SourceFile):
    """What a frame unpacks to, as a file.

    Parameters
    ----------
    inside
        The file that the frame lies in.
    name
        The frame.
    unpackers
        Of all frames of the same reader.
    """

    def __init__(self, inside: SourceFile, name: PackedName, unpackers: Unpackers) -> None:
        self.path, self.size, self.status = str(name), _NO_SIZE, inside.status
        self._inside, self._name, self._unpackers = inside, name, unpackers
        self._library = codec(self.path)
        self._reader: zstandard.ZstdDecompressionReader | None = None
        self._at = 0

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fills ``out`` from a byte on; raises ``truncated-file`` where the frame ends first."""
        with self._unpackers.lock:
            if self._fill(offset, out) < len(out):
                raise self._ended(offset + len(out))

    def start(self, nbytes: int) -> bytes:
        """Returns so many of the first bytes, fewer if the frame ends."""
        out = bytearray(nbytes)
        with self._unpackers.lock:
            return bytes(out[: self._fill(0, memoryview(out))])

    def whole(self, most: int) -> FileEnds:
        """Unpacks a small frame; raises ``packed-item`` where it has more than so many bytes."""
        data = self.start(most + 1)
        if len(data) > most:
            raise packed_item(self.path, "more", f"at most {most:,} bytes")
        return FileEnds(self, data, b"", len(data))

    def ends(self, first: int, last: int, *, least: int, most: int) -> FileEnds:
        """Unpacks all, and returns so many of the first and of the last bytes as a file of the whole size.

        Raises
        ------
        CheckpointError
            ``truncated-file``, ``packed-item``: there are fewer than ``least`` bytes, or more than ``most``.
            ``damaged-record``.
        """
        with self._unpackers.lock:
            head = bytearray(first)
            del head[self._fill(0, memoryview(head)) :]
            tail, block = bytes(head[-last:]), memoryview(bytearray(_READ))
            while got := self._fill(self._at, block):
                tail = (tail + bytes(block[:got]))[-last:]
                if self._at > most:
                    raise packed_item(self.path, "more", f"at most {most:,} bytes")
            if self._at < least:
                raise self._ended(least)
            return FileEnds(self, bytes(head), tail, self._at)

    def read_runs(self, offsets: Sequence[int], outs: Sequence[memoryview]) -> None:
        """Fills each buffer from its offset on."""
        for offset, out in zip(offsets, outs, strict=True):
            self.read_into(offset, out)

    def window(self, offset: int, nbytes: int) -> memoryview:
        """Returns the bytes; nothing of them could be mapped."""
        return memoryview(self.read(offset, nbytes))

    def expect(self, offset: int, nbytes: int) -> None:
        """Reads nothing ahead."""

    def rest(self) -> None:
        """Gives the window back; the next read begins anew."""
        self._reader, self._at = None, 0

    def close(self) -> None:
        """Closes the frame and the file it lies in."""
        self.rest()
        self._unpackers.gone(self)
        self._inside.close()

    def _fill(self, offset: int, out: memoryview) -> int:
        """Fills what there is from a byte on; returns how much that was."""
        try:
            self._go_to(offset)
            done = 0
            while done < len(out) and (got := self._read(out[done:])):
                done += got
        except self._library.ZstdError as error:
            self.rest()
            raise CheckpointError(
                "damaged-record",
                f"a compressed item cannot be unpacked: {error}",
                where=self.path,
                hint="the disk or a copy damaged the file: copy or download it again, or take an earlier checkpoint",
            ) from error
        return done

    def _go_to(self, offset: int) -> None:
        self._unpackers.turn(self)
        if self._reader is None or offset < self._at:
            reader = self._library.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
            self._reader, self._at = reader.stream_reader(_Frame(self._inside, self._name), read_size=_READ), 0
        scratch = memoryview(bytearray(min(_READ, offset - self._at)))
        while self._at < offset and self._read(scratch[: offset - self._at]):
            pass

    def _read(self, out: memoryview) -> int:
        assert self._reader is not None
        got = int(self._reader.readinto(out))
        self._at += got
        return got

    def _ended(self, needed: int) -> CheckpointError:
        return CheckpointError(
            "truncated-file",
            "a compressed item unpacks to less than its .metadata says",
            where=self.path,
            found=f"{self._at:,} bytes",
            expected=f"at least {needed:,} bytes",
            hint="files of two saves are mixed, or one is damaged: copy the directory again",
        )


class FileEnds(SourceFile):
    """The first and the last bytes of a file; what is between them cannot be read."""

    def __init__(self, file: SourceFile, head: bytes, tail: bytes, nbytes: int) -> None:
        self.path, self.size, self.status = file.path, nbytes, file.status
        self._head, self._tail = head, tail

    def read(self, offset: int, nbytes: int) -> bytes:
        """Returns exactly ``nbytes`` bytes from ``offset`` on."""
        self._checked(offset, nbytes)
        if offset + nbytes <= len(self._head):
            return self._head[offset : offset + nbytes]
        start = offset - (self.size - len(self._tail))
        if start < 0:
            raise packed_item(self.path, "records in the middle of an item", "one storage")
        return self._tail[start : start + nbytes]


class _Frame:
    """The compressed bytes, for the library to read."""

    def __init__(self, inside: SourceFile, name: PackedName) -> None:
        self._inside, self._at, self._end = inside, name.begin, name.begin + name.length

    def read(self, nbytes: int) -> bytes:
        data = self._inside.read(self._at, min(nbytes, self._end - self._at))
        self._at += len(data)
        return data


def source_opener() -> Callable[[str], SourceFile]:
    """Returns what opens files, and frames in them by their name, for one reader of many."""
    return partial(_open_source, Unpackers())


def _open_source(unpackers: Unpackers, path: str) -> SourceFile:
    name = packed_name(path)
    return SourceFile(path) if name is None else PackedFile(SourceFile(name.file), name, unpackers)
