"""The zip container of torch >= 1.6: where ``data.pkl`` and the storages lie, checked before it is believed.

Readers that differ on a crafted zip see different models in one file, so there is one canonical reading here:
the central directory, confirmed by each local header, without duplicates, overlaps or compressed storages. Zip
structures are those of PKWARE's APPNOTE 6.3.10 (sections 4.3.7 to 4.3.16), record names those of
``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import struct
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import PurePath
from typing import NamedTuple

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_frames import MOST_PICKLE_BYTES
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent, Record

ZIP_MAGIC = b"PK\x03\x04"

_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x0001
_SIZES_FOLLOW = 0x0008  # sizes stand in a data descriptor: what torch writes for every member
_UNKNOWN_32 = 0xFFFFFFFF  # the real number stands in the zip64 extra field
_UNKNOWN_16 = 0xFFFF

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")

# A descriptor is 12 bytes at least (CRC and two sizes); the signature and zip64 sizes are optional.
_SMALLEST_DESCRIPTOR = 12
# A million storages, and what is held of them in memory, about 400 MB.
_MOST_MEMBERS = 1_000_000
# Fixed part, a name and a zip64 field; torch's entries have about 80 bytes.
_LARGEST_ENTRY = 1024
# Local headers are read together where they are no further apart than a page, up to so many bytes.
_PAGE = 4096
_MOST_AT_ONCE = 1 << 20


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


@dataclass(frozen=True, slots=True)
class TorchZip:
    """The parts of a torch zip.

    Attributes
    ----------
    pickle
        The bytes of ``data.pkl``.
    pickle_offset
        Where they lie in the file; 0 if they were compressed.
    storages
        By key, each stored plain.
    archive
        The directory inside the zip: ``torch.save`` gives it the name of the file that it writes, without its ending.
    """

    pickle: bytes
    pickle_offset: int
    storages: Mapping[str, Extent]
    archive: str


def read_torch_zip(file: SourceFile) -> TorchZip:
    """Returns the parts of a torch zip.

    Raises
    ------
    CheckpointError
        ``truncated-file``, ``damaged-zip``: cut short or malformed. ``hostile-zip``: two readers could see
        different contents. ``torchscript``, ``big-endian``, ``compressed-storage``: kinds that are not read.
    """
    members, directory = read_directory(file)
    _check_names(file, members)
    payloads = _payloads(file, members, directory)
    prefix = _prefix(file, members)
    _check_byte_order(file, prefix, payloads)
    name = f"{prefix}/data.pkl"
    member, offset = payloads[name]
    pickle = _unpack(file, member, offset)
    storages = _storages(file, f"{prefix}/data/", payloads)
    return TorchZip(pickle, offset if member.method == _STORED else 0, storages, prefix)


def storage_records(file: SourceFile) -> Iterator[Record]:
    """Yields the storages of a torch zip that was read before, with their checksums."""
    members, directory = read_directory(file)
    folder = f"{_prefix(file, members)}/data/"
    for name, (member, offset) in _payloads(file, members, directory).items():
        if name.startswith(folder):
            yield Record(name, offset, member.size, member.crc)


def _zip_error(code: str, what: str, file: SourceFile, at: int, found: str = "") -> CheckpointError:
    hint = ""
    if code == "damaged-zip":
        hint = "copy or download the file again; a checkpoint still being written looks like this too"
    return CheckpointError(code, what, where=f"{file.path}, byte {at}", found=found, hint=hint)


def _damaged(what: str, file: SourceFile, at: int, found: str = "") -> CheckpointError:
    return _zip_error("damaged-zip", what, file, at, found)


def _hostile(what: str, file: SourceFile, at: int, found: str = "") -> CheckpointError:
    return _zip_error("hostile-zip", what, file, at, found)


# The central directory


def read_directory(file: SourceFile) -> tuple[list[Member], int]:
    """Returns the members that the central directory lists, and the offset it begins at."""
    start, size, count = _locate_directory(file)
    if count > _MOST_MEMBERS or size > count * _LARGEST_ENTRY:
        raise _hostile("the zip directory is larger than any checkpoint's", file, start, f"{size} bytes")
    data = file.read(start, size)
    members = []
    at = 0
    while at < size:
        member, at = _central_entry(file, data, at, start)
        members.append(member)
    if len(members) != count or not members:
        raise _damaged("the zip directory has another number of entries than its end record says", file, start)
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
        pairs = ((start, wide[0], _UNKNOWN_32), (size, wide[1], _UNKNOWN_32), (count, wide[2], _UNKNOWN_16))
        if any(narrow not in (number, unknown) for narrow, number, unknown in pairs):
            raise _hostile("the two end records of the zip disagree", file, end)
        return wide
    if disk or first_disk or here != count or comment:
        raise _damaged("the zip spans several files, or has a comment", file, end)
    if start + size != end:
        raise _damaged("the zip directory does not reach to its end record", file, end)
    return start, size, count


def _end64(file: SourceFile, end: int) -> tuple[int, int, int] | None:
    """The zip64 end record, which torch always writes; its locator must point to it (CVE-2025-8291)."""
    at = end - _LOCATOR.size
    raw = file.read(at, _LOCATOR.size) if at >= _END64.size else b""
    if raw[:4] != b"PK\x06\x07":
        return None
    _, disk, record, disks = _LOCATOR.unpack(raw)
    if disk or disks > 1 or record + _END64.size != at:
        raise _hostile("the zip64 locator does not point to the record before it", file, at)
    signature, length, _, _, disk, first_disk, here, count, size, start = _END64.unpack(file.read(record, _END64.size))
    if signature != b"PK\x06\x06" or length != _END64.size - 12 or disk or first_disk or here != count:
        raise _damaged("the zip64 end record is malformed", file, record)
    if start + size != record:
        raise _damaged("the zip directory does not reach to its end record", file, record)
    return start, size, count


def _no_end_record(file: SourceFile) -> CheckpointError:
    tail = file.read(max(0, file.size - (1 << 16)), min(file.size, 1 << 16))
    if b"PK\x05\x06" in tail:
        return _hostile("bytes follow the end of the zip", file, file.size, "the end record is not last")
    return CheckpointError(
        "truncated-file",
        "the zip has no end record: the file is cut short",
        where=file.path,
        found=f"{file.size} bytes",
        hint="copy or download the file again; a checkpoint still being written looks like this too",
    )


def _central_entry(file: SourceFile, data: bytes, at: int, base: int) -> tuple[Member, int]:
    if at + _CENTRAL.size > len(data) or data[at : at + 4] != b"PK\x01\x02":
        raise _damaged("the zip directory is malformed", file, base + at)
    fields = _CENTRAL.unpack_from(data, at)
    flags, method, crc, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
    name_end = at + _CENTRAL.size + fields[10]
    extra_end = name_end + fields[11]
    end = extra_end + fields[12]
    if end > len(data):
        raise _damaged("the zip directory is malformed", file, base + at)
    header: int = fields[16]
    if _UNKNOWN_32 in (packed, size, header):
        size, packed, header = _wide_sizes(data[name_end:extra_end], (size, packed, header), file, base + at)
    if flags & _ENCRYPTED or fields[13] not in (0, _UNKNOWN_16):
        raise _damaged("the zip is encrypted or spans several files", file, base + at)
    name = _decoded(data[at + _CENTRAL.size : name_end], file, base + at)
    return Member(name, header, packed, size, method, flags, crc), end


def _wide_sizes(extra: bytes, narrow: tuple[int, int, int], file: SourceFile, at: int) -> tuple[int, int, int]:
    """Returns the three numbers; those that did not fit stand in the zip64 field (id 1), in this order."""
    while len(extra) >= 4:
        field, length = struct.unpack_from("<HH", extra)
        if field == 1:
            missing = [number == _UNKNOWN_32 for number in narrow]
            if length > len(extra) - 4 or length < 8 * sum(missing):
                break
            wide = iter(struct.unpack_from(f"<{sum(missing)}Q", extra, 4))
            size, packed, header = (
                next(wide) if gone else number for gone, number in zip(missing, narrow, strict=True)
            )
            return size, packed, header
        extra = extra[4 + length :]
    raise _damaged("a zip64 field is missing or malformed", file, at)


def _decoded(raw: bytes, file: SourceFile, at: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _damaged("a member's name is not UTF-8", file, at, repr(raw[:64])) from error


# What the directory may say


def _check_names(file: SourceFile, members: Iterable[Member]) -> None:
    """Refuses names that two readers could take for different, or for the same, members."""
    seen: set[str] = set()
    for member in members:
        name = member.name
        if "\0" in name or "\\" in name or name[:1] == "/" or (".." in name and ".." in name.split("/")):
            raise _hostile("a member's name is not a plain relative path", file, member.header, repr(name[:80]))
        same = name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
        if same in seen:
            raise _hostile("two members of the zip have one name", file, member.header, repr(name[:80]))
        seen.add(same)


def _payloads(file: SourceFile, members: list[Member], directory: int) -> dict[str, tuple[Member, int]]:
    """Returns each member with the offset of its bytes, in the directory's order; none may overlap another."""
    end = 0
    offsets: dict[str, int] = {}
    ordered = sorted(members, key=_header_of)
    for member, raw in zip(ordered, _local_headers(file, ordered), strict=True):
        if member.header < end:
            raise _hostile("two members of the zip overlap", file, member.header, repr(member.name[:80]))
        offsets[member.name] = _payload_offset(file, member, raw)
        end = offsets[member.name] + member.packed
        end += _SMALLEST_DESCRIPTOR if member.flags & _SIZES_FOLLOW else 0
        if end > directory:
            raise _hostile("a member reaches into the zip directory", file, member.header, repr(member.name[:80]))
    if all(member.header for member in members):
        raise _hostile("the zip does not begin with its first member", file, 0)
    return {member.name: (member, offsets[member.name]) for member in members}


_header_of = attrgetter("header")


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
        raise _damaged("a member has no local header", file, member.header, repr(member.name[:80]))
    agrees = name_length == len(name) and raw[_LOCAL.size :] == name and method == member.method
    if not flags & _SIZES_FOLLOW:
        agrees = agrees and size in (member.size, _UNKNOWN_32) and packed in (member.packed, _UNKNOWN_32)
    if not agrees or flags & _ENCRYPTED:
        raise _hostile("a member's two headers disagree", file, member.header, repr(member.name[:80]))
    if member.method == _STORED and member.packed != member.size:
        raise _hostile("a stored member has two sizes", file, member.header, repr(member.name[:80]))
    return member.header + len(raw) + int(extra_length)


def _prefix(file: SourceFile, members: list[Member]) -> str:
    """Returns the directory inside the zip, which all members share, of a file that ``torch.save`` wrote."""
    prefix = members[0].name.split("/", 1)[0]
    names = {member.name for member in members}
    folder, code = f"{prefix}/", f"{prefix}/code/"
    if not all(name.startswith(folder) for name in names):
        raise _hostile("the members of the zip do not share one directory", file, 0, repr(prefix[:80]))
    if f"{prefix}/constants.pkl" in names or any(name.startswith(code) for name in names):
        raise CheckpointError(
            "torchscript",
            "this is a TorchScript archive: a program, not a checkpoint (OpenAI's own CLIP files are such)",
            where=file.path,
            hint="where it is trusted: " + _save_state(file.path),
        )
    if f"{prefix}/data.pkl" not in names or sum(name.endswith("/data.pkl") for name in names) != 1:
        raise _hostile("the zip does not hold exactly one data.pkl", file, 0)
    return prefix


def _save_state(path: str) -> str:
    """The command that saves the state dict of a TorchScript archive, in the directory it is run in."""
    import shlex

    out = f"{PurePath(path).stem}-state.pth"
    text = f"import torch; torch.save(torch.jit.load({path!r}, 'cpu').state_dict(), {out!r})"
    return f"python -c {shlex.quote(text)}"


def _check_byte_order(file: SourceFile, prefix: str, payloads: Mapping[str, tuple[Member, int]]) -> None:
    """Files before torch 2.1 do not say; all machines in use then were little-endian."""
    member, offset = payloads.get(f"{prefix}/byteorder", (None, 0))
    order = _unpack(file, member, offset, most=16) if member else b"little"
    if order == b"big":
        raise CheckpointError(
            "big-endian",
            "the checkpoint was written on a big-endian machine, which is not read",
            where=file.path,
            hint="load and save it once with torch on a little-endian machine",
        )
    if order != b"little":
        raise _damaged("the byte order is neither little nor big", file, offset, repr(order))


# Bytes of members


def _unpack(file: SourceFile, member: Member, offset: int, most: int = MOST_PICKLE_BYTES) -> bytes:
    """Returns a small member's bytes, inflated if need be, never more than ``most``."""
    if max(member.size, member.packed) > most:
        raise _hostile("a member is larger than any checkpoint's", file, offset, f"{member.size} bytes")
    raw = file.read(offset, member.packed)
    if member.method == _DEFLATED:
        raw = _inflate(file, member, offset, raw)
    elif member.method != _STORED:
        raise _damaged("a member is packed by an unknown method", file, offset, f"method {member.method}")
    if member.crc and zlib.crc32(raw) != member.crc:
        raise _damaged("a member's checksum is wrong", file, offset, repr(member.name[:80]))
    return raw


def _inflate(file: SourceFile, member: Member, offset: int, raw: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(raw, member.size + 1)
    except zlib.error as error:
        raise _damaged("a member cannot be inflated", file, offset, repr(member.name[:80])) from error
    if len(data) != member.size or not inflater.eof or inflater.unused_data:
        raise _hostile("a member inflates to another size than announced", file, offset, repr(member.name[:80]))
    return data


@dataclass(frozen=True, slots=True)
class _Storages(Mapping[str, Extent]):
    """Storages by key; extents are made when asked for, since of most rank files one or two are."""

    path: str
    folder: str
    payloads: Mapping[str, tuple[Member, int]]

    def __getitem__(self, key: str) -> Extent:
        member, offset = self.payloads[self.folder + key]
        return Extent(self.path, offset, member.size)

    def __iter__(self) -> Iterator[str]:
        return (name[len(self.folder) :] for name in self.payloads if name.startswith(self.folder))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _storages(file: SourceFile, folder: str, payloads: Mapping[str, tuple[Member, int]]) -> Mapping[str, Extent]:
    for name, (member, offset) in payloads.items():
        if member.method != _STORED and name.startswith(folder):
            raise CheckpointError(
                "compressed-storage",
                "the zip was compressed after torch wrote it, so tensors cannot be read by byte range",
                where=f"{file.path}, byte {offset}",
                found=name,
                hint="unpack it and store it again without compression (zip -0)",
            )
    return _Storages(file.path, folder, payloads)
