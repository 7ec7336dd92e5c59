"""The central directory of a zip: which members there are, checked before it is believed.

Structures are those of PKWARE's APPNOTE 6.3.10 (sections 4.3.12 to 4.3.16).
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from shardmerge.errors import CheckpointError
from shardmerge.sources.zip_errors import cut_short, damaged, hostile
from shardmerge.storage.reading import SourceFile

ENCRYPTED = 0x0001
UNKNOWN_32 = 0xFFFFFFFF  # the real number stands in the zip64 extra field
_UNKNOWN_16 = 0xFFFF

_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")

# A million storages, and what is held of them in memory, about 400 MB.
_MOST_MEMBERS = 1_000_000
# Fixed part, a name and a zip64 field; torch's entries have about 80 bytes.
_LARGEST_ENTRY = 1024


class Member(NamedTuple):
    """An entry of the central directory: a tuple, since a run of 1,024 ranks has over a million of them.

    Attributes
    ----------
    header
        Offset of its local header, in bytes.
    packed, size
        Bytes in the file, and when unpacked.
    crc
        CRC-32 of the unpacked bytes; torch can be told to write 0.
    """

    name: str
    header: int
    packed: int
    size: int
    method: int
    flags: int
    crc: int


def read_directory(file: SourceFile) -> tuple[list[Member], int]:
    """Returns the members that the central directory lists, and the offset it begins at."""
    start, size, count = _locate_directory(file)
    if count > _MOST_MEMBERS or size > count * _LARGEST_ENTRY:
        raise hostile("the zip directory is larger than any checkpoint's", file, start, f"{size} bytes")
    data = file.read(start, size)
    members = []
    at = 0
    while at < size:
        member, at = _central_entry(file, data, at, start)
        members.append(member)
    if len(members) != count or not members:
        raise damaged("the zip directory has another number of entries than its end record says", file, start)
    return members, start


def _locate_directory(file: SourceFile) -> tuple[int, int, int]:
    """Returns offset, size and entry count of the directory. The end record must be the end of the file."""
    end = file.size - _END.size
    raw = file.read(end, _END.size) if end >= 0 else b""
    if raw[:4] != b"PK\x05\x06":
        raise _no_end_record(file)
    _, disk, first_disk, here, count, size, start, comment = _END.unpack(raw)
    wide = _end64(file, end)
    if wide is not None:
        pairs = ((start, wide[0], UNKNOWN_32), (size, wide[1], UNKNOWN_32), (count, wide[2], _UNKNOWN_16))
        if any(narrow not in (number, unknown) for narrow, number, unknown in pairs):
            raise hostile("the two end records of the zip disagree", file, end)
        return wide
    if disk or first_disk or here != count or comment:
        raise damaged("the zip spans several files, or has a comment", file, end)
    if start + size != end:
        raise damaged("the zip directory does not reach to its end record", file, end)
    return start, size, count


def _end64(file: SourceFile, end: int) -> tuple[int, int, int] | None:
    """The zip64 end record, which torch always writes; its locator must point to it (CVE-2025-8291)."""
    at = end - _LOCATOR.size
    raw = file.read(at, _LOCATOR.size) if at >= _END64.size else b""
    if raw[:4] != b"PK\x06\x07":
        return None
    _, disk, record, disks = _LOCATOR.unpack(raw)
    if disk or disks > 1 or record + _END64.size != at:
        raise hostile("the zip64 locator does not point to the record before it", file, at)
    signature, length, _, _, disk, first_disk, here, count, size, start = _END64.unpack(file.read(record, _END64.size))
    if signature != b"PK\x06\x06" or length != _END64.size - 12 or disk or first_disk or here != count:
        raise damaged("the zip64 end record is malformed", file, record)
    if start + size != record:
        raise damaged("the zip directory does not reach to its end record", file, record)
    return start, size, count


def _no_end_record(file: SourceFile) -> CheckpointError:
    tail = file.read(max(0, file.size - (1 << 16)), min(file.size, 1 << 16))
    if b"PK\x05\x06" in tail:
        return hostile("bytes follow the end of the zip", file, file.size, "the end record is not last")
    return cut_short(file)


def _central_entry(file: SourceFile, data: bytes, at: int, base: int) -> tuple[Member, int]:
    if at + _CENTRAL.size > len(data) or data[at : at + 4] != b"PK\x01\x02":
        raise damaged("the zip directory is malformed", file, base + at)
    fields = _CENTRAL.unpack_from(data, at)
    flags, method, crc, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
    name_end = at + _CENTRAL.size + fields[10]
    extra_end = name_end + fields[11]
    end = extra_end + fields[12]
    if end > len(data):
        raise damaged("the zip directory is malformed", file, base + at)
    header: int = fields[16]
    if UNKNOWN_32 in (packed, size, header):
        size, packed, header = _wide_sizes(data[name_end:extra_end], (size, packed, header), file, base + at)
    if flags & ENCRYPTED or fields[13] not in (0, _UNKNOWN_16):
        raise damaged("the zip is encrypted or spans several files", file, base + at)
    name = _decoded(data[at + _CENTRAL.size : name_end], file, base + at)
    return Member(name, header, packed, size, method, flags, crc), end


def _wide_sizes(extra: bytes, narrow: tuple[int, int, int], file: SourceFile, at: int) -> tuple[int, int, int]:
    """Returns the three numbers; those that did not fit stand in the zip64 field (id 1), in this order."""
    while len(extra) >= 4:
        field, length = struct.unpack_from("<HH", extra)
        if field == 1:
            missing = [number == UNKNOWN_32 for number in narrow]
            if length > len(extra) - 4 or length < 8 * sum(missing):
                break
            wide = iter(struct.unpack_from(f"<{sum(missing)}Q", extra, 4))
            size, packed, header = (
                next(wide) if gone else number for gone, number in zip(missing, narrow, strict=True)
            )
            return size, packed, header
        extra = extra[4 + length :]
    raise damaged("a zip64 field is missing or malformed", file, at)


def _decoded(raw: bytes, file: SourceFile, at: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise damaged("a member's name is not UTF-8", file, at, repr(raw[:64])) from error


def check_names(file: SourceFile, members: Iterable[Member]) -> None:
    """Refuses names that two readers could take for different, or for the same, members."""
    seen: set[str] = set()
    for member in members:
        name = member.name
        if "\0" in name or "\\" in name or name[:1] == "/" or (".." in name and ".." in name.split("/")):
            raise hostile("a member's name is not a plain relative path", file, member.header, repr(name[:80]))
        same = name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
        if same in seen:
            raise hostile("two members of the zip have one name", file, member.header, repr(name[:80]))
        seen.add(same)
