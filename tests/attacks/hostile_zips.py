"""Builds torch zips byte by byte, as broken as a test wants them."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace

STORAGE = struct.pack("<4f", 1, 2, 3, 4)

# {'w': tensor of 4 floats in storage '0'}
PICKLE = (
    b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
)


@dataclass(frozen=True)
class Entry:
    """A member and the lies about it; ``None`` is the truth."""

    name: str
    data: bytes
    method: int = 0
    local_name: str | None = None
    local_method: int | None = None
    local_size: int | None = None
    size: int | None = None
    packed: int | None = None
    crc: int | None = None
    header: int | None = None
    flags: int = 0x0800
    local_extra: bytes = b""
    extra: bytes = b""
    disk: int = 0

    @property
    def raw(self) -> bytes:
        """What stands in the file."""
        if self.method != 8:
            return self.data
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(self.data) + packer.flush()


def sound() -> list[Entry]:
    """The members of a checkpoint that nothing is wrong with."""
    return [
        Entry("archive/data.pkl", PICKLE),
        Entry("archive/byteorder", b"little"),
        Entry("archive/data/0", STORAGE),
        Entry("archive/version", b"3\n"),
    ]


def changed(index: int, **lies: object) -> list[Entry]:
    """The sound members with one changed."""
    entries = sound()
    entries[index] = replace(entries[index], **lies)
    return entries


def _local(entry: Entry) -> bytes:
    name = (entry.name if entry.local_name is None else entry.local_name).encode()
    size = len(entry.data) if entry.local_size is None else entry.local_size
    method = entry.method if entry.local_method is None else entry.local_method
    packed = len(entry.raw) if entry.local_size is None else entry.local_size
    fields = (20, entry.flags, method, 0, 0, zlib.crc32(entry.data), packed, size, len(name), len(entry.local_extra))
    return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fields) + name + entry.local_extra


def _central(entry: Entry, header: int) -> bytes:
    name = entry.name.encode()
    fields = (
        20, 20, entry.flags, entry.method, 0, 0, zlib.crc32(entry.data) if entry.crc is None else entry.crc,
        len(entry.raw) if entry.packed is None else entry.packed,
        len(entry.data) if entry.size is None else entry.size,
        len(name), len(entry.extra), 0, entry.disk, 0, 0, header if entry.header is None else entry.header,
    )  # fmt: skip
    return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *fields) + name + entry.extra


def build(entries: list[Entry], *, count: int | None = None, gap: int = 0, wide: bool = False, shift: int = 0) -> bytes:
    """Returns the zip. ``wide`` adds zip64 end records, ``shift`` moves where its locator points."""
    body, directory = b"", b""
    for entry in entries:
        directory += _central(entry, len(body))
        body += _local(entry) + entry.raw + (b"\0" * 16 if entry.flags & 8 else b"")
    start, number = len(body), len(entries) if count is None else count
    body += directory + b"\0" * gap
    if wide:
        record = len(body)
        body += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, number, number, len(directory), start)
        body += struct.pack("<4sIQI", b"PK\6\7", 0, record + shift, 1)
    return body + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, number, number, len(directory), start, 0)
