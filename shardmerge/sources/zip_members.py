"""The members of a zip: where the bytes of each begin, by its local header, and the bytes of a small one.

A local header (APPNOTE 6.3.10, section 4.3.7) confirms what the directory says, or the zip is refused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from operator import attrgetter

from shardmerge.sources.pickle_frames import MOST_PICKLE_BYTES
from shardmerge.sources.zip_directory import ENCRYPTED, UNKNOWN_32, Member
from shardmerge.sources.zip_errors import damaged, hostile
from shardmerge.storage.reading import SourceFile

ZIP_MAGIC = b"PK\x03\x04"

STORED, _DEFLATED = 0, 8
_SIZES_FOLLOW = 0x0008  # sizes stand in a data descriptor: what torch writes for every member

_LOCAL = struct.Struct("<4sHHHHHIIIHH")

# A descriptor is 12 bytes at least (CRC and two sizes); the signature and zip64 sizes are optional.
_SMALLEST_DESCRIPTOR = 12
# What a member may inflate to: the pickle of 20,000 tensors shrinks to a 5th, zeros to a 1000th.
_FREE_INFLATED, _MOST_INFLATED = 1 << 20, 16
# Local headers are read together where they are no further apart than a page, up to so many bytes.
_PAGE = 4096
_MOST_AT_ONCE = 1 << 20

_header_of = attrgetter("header")


def find_payloads(file: SourceFile, members: list[Member], directory: int) -> dict[str, tuple[Member, int]]:
    """Returns each member with the offset of its bytes, in the directory's order; none may overlap another."""
    end = 0
    offsets: dict[str, int] = {}
    ordered = sorted(members, key=_header_of)
    for member, raw in zip(ordered, _local_headers(file, ordered), strict=True):
        if member.header < end:
            raise hostile("two members of the zip overlap", file, member.header, repr(member.name[:80]))
        offsets[member.name] = _payload_offset(file, member, raw)
        end = offsets[member.name] + member.packed
        end += _SMALLEST_DESCRIPTOR if member.flags & _SIZES_FOLLOW else 0
        if end > directory:
            raise hostile("a member reaches into the zip directory", file, member.header, repr(member.name[:80]))
    if all(member.header for member in members):
        raise hostile("the zip does not begin with its first member", file, 0)
    return {member.name: (member, offsets[member.name]) for member in members}


def _local_headers(file: SourceFile, members: Sequence[Member]) -> Iterator[bytes]:
    """Yields the local header of each member, its name included. ``members`` are in the order of their headers."""
    start, data = 0, b""
    for index, member in enumerate(members):
        length = _LOCAL.size + len(member.name.encode())
        at = member.header - start
        if not 0 <= at <= len(data) - length:
            start, at = member.header, 0
            data = file.read(start, max(_run_end(members, index, file.size) - start, length))
        yield data[at : at + length]


def _run_end(members: Sequence[Member], first: int, most: int) -> int:
    """Returns where a read that begins with a member's header should end: behind those that lie close together."""
    last, start = members[first], members[first].header
    for index in range(first + 1, len(members)):
        if members[index].header - last.header > _PAGE or members[index].header - start > _MOST_AT_ONCE:
            break
        last = members[index]
    return min(last.header + _LOCAL.size + len(last.name.encode()), most)


def _payload_offset(file: SourceFile, member: Member, raw: bytes) -> int:
    """Returns where a member's bytes begin: local names and extra fields differ from those of the directory.

    torch pads the local extra field (id ``FB``) so that storages begin at multiples of 64 bytes.
    """
    name = member.name.encode()
    signature, _, flags, method, _, _, _, packed, size, name_length, extra_length = _LOCAL.unpack_from(raw)
    if signature != ZIP_MAGIC:
        raise damaged("a member has no local header", file, member.header, repr(member.name[:80]))
    agrees = name_length == len(name) and raw[_LOCAL.size :] == name and method == member.method
    if not flags & _SIZES_FOLLOW:
        agrees = agrees and size in (member.size, UNKNOWN_32) and packed in (member.packed, UNKNOWN_32)
    if not agrees or flags & ENCRYPTED:
        raise hostile("a member's two headers disagree", file, member.header, repr(member.name[:80]))
    if member.method == STORED and member.packed != member.size:
        raise hostile("a stored member has two sizes", file, member.header, repr(member.name[:80]))
    return member.header + len(raw) + int(extra_length)


def unpack(file: SourceFile, member: Member, offset: int, most: int = MOST_PICKLE_BYTES) -> bytes:
    """Returns a small member's bytes, inflated if need be, never more than ``most``."""
    if max(member.size, member.packed) > most:
        raise hostile("a member is larger than any checkpoint's", file, offset, f"{member.size} bytes")
    raw = file.read(offset, member.packed)
    if member.method == _DEFLATED:
        raw = _inflate(file, member, offset, raw)
    elif member.method != STORED:
        raise damaged("a member is packed by an unknown method", file, offset, f"method {member.method}")
    if member.crc and zlib.crc32(raw) != member.crc:
        raise damaged("a member's checksum is wrong", file, offset, repr(member.name[:80]))
    return raw


def _inflate(file: SourceFile, member: Member, offset: int, raw: bytes) -> bytes:
    if member.size > _FREE_INFLATED + _MOST_INFLATED * member.packed:
        raise hostile("a member inflates to more than any checkpoint's", file, offset, f"{member.size} bytes")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(raw, member.size + 1)
    except zlib.error as error:
        raise damaged("a member cannot be inflated", file, offset, repr(member.name[:80])) from error
    if len(data) != member.size or not inflater.eof or inflater.unused_data:
        raise hostile("a member inflates to another size than announced", file, offset, repr(member.name[:80]))
    return data
