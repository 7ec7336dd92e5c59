"""How tensors are laid out in a torch file (``.bin``, ``.pth``). Every offset is fixed before any byte moves.

The file is the zip of ``torch.save`` byte for byte (torch 2.13), without its last record ``.data/serialization_id``:
a hash over the data, used in a log alone, which files before torch 2.1 do not have. Any valid zip would not do, since
torch can compute where records lie instead of reading their headers (``calculate_storage_offsets`` in
``torch/utils/serialization/config.py``, and always under a ``FakeTensorMode``).

Sources: ``caffe2/serialize/inline_container.cc`` (records, padding), ``mz_zip_writer_add_mem_ex_v2`` in miniz 3.0.2
(headers), PKWARE's APPNOTE 6.3.10 (sections 4.3.7 to 4.3.16, 4.5.3), and files written by torch 2.13.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from shardmerge.dtypes import DType
from shardmerge.errors import TargetError
from shardmerge.plan.torch_pickle import state_dict_pickle, tensor_pickle

# What torch.save aligns the data of a record to, in bytes; it stands in the file, for readers that count on it.
ALIGNMENT = 64

# What torch.save calls the directory inside the zip where it writes to no file but to a stream.
_OF_A_STREAM = "archive"

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_DESCRIPTOR = struct.Struct("<4sIII")
_DESCRIPTOR64 = struct.Struct("<4sIQQ")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")

_UTF8 = 0x0800
_SIZES_FOLLOW = 0x0008  # a data descriptor follows the data; miniz writes none after an empty record
_WIDE = 0xFFFFFFFF  # from here on a number stands in the zip64 extra field instead
_CRC_IN_DESCRIPTOR = 4
_CRC_IN_CENTRAL = 16

# Sizes and strides are signed 64-bit numbers in torch.
_MOST_ELEMENTS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class TorchLayout:
    """Where everything lies in a torch file.

    Attributes
    ----------
    nbytes
        Size of the file.
    offsets
        Of each tensor's data, in the order given; multiples of 64.
    blobs
        All other bytes of the file as (offset, bytes), ascending; the first begins at 0. The CRC-32 fields of the
        tensors in them are zero.
    crc_fields
        Per tensor, the offsets of the 4-byte little-endian fields that hold the CRC-32 of its data; none for a tensor
        without elements.
    """

    nbytes: int
    offsets: tuple[int, ...]
    blobs: tuple[tuple[int, bytes], ...]
    crc_fields: tuple[tuple[int, ...], ...]


def lay_out_torch(tensors: Sequence[tuple[str, DType, tuple[int, ...]]], archive: str) -> TorchLayout:
    """Returns the layout of ``torch.save(OrderedDict(name -> tensor), path)``.

    Parameters
    ----------
    tensors
        Name, type and shape of each, in the order of the state dict and of the data. Names are distinct.
    archive
        The directory inside the zip; torch takes the file's name without its last suffix.

    Raises
    ------
    TargetError
        ``shape-too-large``: a tensor without elements whose shape torch cannot hold.
    """
    for name, _, shape in tensors:
        check_shape(name, shape)
    return _lay_out(state_dict_pickle(tensors), [(dtype, shape) for _, dtype, shape in tensors], archive)


def lay_out_item(dtype: DType, shape: tuple[int, ...]) -> TorchLayout:
    """Returns the layout of ``torch.save(tensor, stream)``; the shape is one that ``check_shape`` let pass."""
    return _lay_out(tensor_pickle(dtype, shape), [(dtype, shape)], _OF_A_STREAM)


def torch_file(pickle: bytes, storages: Sequence[bytes], archive: str) -> bytes:
    """Returns a small file as ``torch.save`` writes it: its pickle, and what lies in storages ``0``, ``1``, ..."""
    records = _Records(archive)
    _add_head(records, pickle)
    for key, data in enumerate(storages):
        records.add(f"data/{key}", data)
    records.add("version", b"3\n")
    records.finish()
    return records.blobs[0][1]


def _lay_out(pickle: bytes, tensors: Sequence[tuple[DType, tuple[int, ...]]], archive: str) -> TorchLayout:
    records = _Records(archive)
    _add_head(records, pickle)
    placed = [
        records.reserve(f"data/{key}", prod(shape) * dtype.itemsize) for key, (dtype, shape) in enumerate(tensors)
    ]
    records.add("version", b"3\n")
    directory, nbytes = records.finish()
    return TorchLayout(
        nbytes,
        tuple(place.offset for place in placed),
        tuple(records.blobs),
        tuple(place.crc_fields(directory) for place in placed),
    )


def _add_head(records: _Records, pickle: bytes) -> None:
    """Adds what comes before the data."""
    records.add("data.pkl", pickle)
    records.add(".format_version", b"1")
    records.add(".storage_alignment", b"%d" % ALIGNMENT)
    records.add("byteorder", b"little")


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raises ``shape-too-large``: ``(2**40, 2**40, 0)`` is fine in safetensors; torch cannot make such a tensor."""
    if prod(size or 1 for size in shape) > _MOST_ELEMENTS:
        raise TargetError(
            "shape-too-large",
            "a torch file cannot hold a tensor of this shape",
            where=name,
            found=str(list(shape)),
            expected="fewer than 2**63 elements, counting an empty dimension as one",
            hint="write safetensors, or leave this tensor out",
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record's data lies, and its entry in the directory (relative to where that begins)."""

    offset: int
    size: int
    entry: int

    def crc_fields(self, directory: int) -> tuple[int, ...]:
        if not self.size:
            return ()
        return self.offset + self.size + _CRC_IN_DESCRIPTOR, directory + self.entry + _CRC_IN_CENTRAL


class _Records:
    """The records of a zip, one after the other, each followed by its data descriptor; then the directory."""

    def __init__(self, archive: str) -> None:
        self.blobs: list[tuple[int, bytes]] = []
        self._archive = archive
        self._blob = bytearray()  # bytes that end at the cursor, not yet in blobs
        self._start = 0
        self._directory = bytearray()
        self._count = 0

    def add(self, name: str, data: bytes) -> None:
        """Adds a record whose bytes are known."""
        header = self._cursor
        crc = zlib.crc32(data)
        self._open(name, len(data), crc)
        self._blob += data + _descriptor(header, len(data), crc)

    def reserve(self, name: str, size: int) -> _Place:
        """Adds a record of ``size`` bytes that somebody else writes."""
        header = self._cursor
        entry = self._open(name, size, 0)
        offset = self._cursor
        if size:
            self._flush()
            self._start = offset + size
            self._blob += _descriptor(header, size, 0)
        return _Place(offset, size, entry)

    def finish(self) -> tuple[int, int]:
        """Adds the directory and the end records. Returns the offset of the directory and the size of the file."""
        directory = self._cursor
        self._blob += self._directory
        self._blob += _end_records(directory, len(self._directory), self._count)
        nbytes = self._cursor
        self._flush()
        return directory, nbytes

    @property
    def _cursor(self) -> int:
        return self._start + len(self._blob)

    def _flush(self) -> None:
        self.blobs.append((self._start, bytes(self._blob)))
        self._blob.clear()

    def _open(self, name: str, size: int, crc: int) -> int:
        """Adds a local header and an entry to the directory; returns where in the directory that begins."""
        header = self._cursor
        entry = len(self._directory)
        raw = f"{self._archive}/{name}".encode()
        self._blob += _local_header(raw, header, size)
        self._directory += _central_entry(raw, header, size, crc)
        self._count += 1
        return entry


def _flags(size: int) -> int:
    return _UTF8 | _SIZES_FOLLOW if size else _UTF8


def _zip64(header: int, size: int, packed: int) -> bytes:
    """Returns the zip64 extra field: the two sizes and the header's offset, where they do not fit; or nothing."""
    numbers = ([size, packed] if size >= _WIDE else []) + ([header] if header >= _WIDE else [])
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _local_header(name: bytes, header: int, size: int) -> bytes:
    """Returns a header padded (extra field ``FB``) so that the data after it is aligned. Sizes and CRC follow the data.

    The time is zero, as in every file of torch, and so is the version needed.
    """
    extra = _zip64(header, size, 0)  # miniz does not know the packed size yet
    padding = -(header + _LOCAL.size + len(name) + len(extra) + 4) % ALIGNMENT
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    fixed = _LOCAL.pack(b"PK\x03\x04", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra))
    return fixed + name + extra


def _descriptor(header: int, size: int, crc: int) -> bytes:
    """Returns what follows a record's data; its sizes have 8 bytes where the header has a zip64 field."""
    if not size:
        return b""
    form = _DESCRIPTOR64 if max(header, size) >= _WIDE else _DESCRIPTOR
    return form.pack(b"PK\x07\x08", crc, size, size)


def _central_entry(name: bytes, header: int, size: int, crc: int) -> bytes:
    extra = _zip64(header, size, size)
    sizes = min(size, _WIDE)
    lengths = (len(name), len(extra), 0)
    fields = (0, 0, _flags(size), 0, 0, 0, crc, sizes, sizes, *lengths, 0, 0, 0, min(header, _WIDE))
    return _CENTRAL.pack(b"PK\x01\x02", *fields) + name + extra


def _end_records(directory: int, size: int, count: int) -> bytes:
    """Returns the zip64 end record and its locator, which torch writes into every file, and the classic end record."""
    made_by = 0x031E  # Unix, 3.0
    end64 = _END64.pack(
        b"PK\x06\x06", _END64.size - 12, made_by, 45, 0, 0, count, count, size, directory
    )  # 45: zip64 needed; 12: the record's size leaves out its first two fields
    locator = _LOCATOR.pack(b"PK\x06\x07", 0, directory + size, 1)
    few = min(count, 0xFFFF)
    return end64 + locator + _END.pack(b"PK\x05\x06", 0, 0, few, few, min(size, _WIDE), min(directory, _WIDE), 0)
