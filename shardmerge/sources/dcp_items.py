"""Items of ``.distcp`` files: each is one whole ``torch.save`` of a tensor, and its head says where the bytes begin.

    archive/data.pkl   _rebuild_tensor_v2 of one storage: sizes, strides, element type
    archive/...        .format_version, .storage_alignment, byteorder, as the version of torch writes them
    archive/data/0     the bytes, at 448, 704 or 768 (torch 2.1 to 2.13), wherever the item itself begins

The zip's directory at the item's end is not read: the head has all that is needed, and the pickle says how long the
storage is (``torch/distributed/checkpoint/filesystem.py``, ``_write_item``). One read an item, of 1 KiB: of a
million items that is what a plan takes longest for, and equal heads are understood once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError
from shardmerge.packed_names import PackedName
from shardmerge.sources.dcp_table import StoredChunk
from shardmerge.sources.file_part import FilePart
from shardmerge.sources.pickle_values import TensorRef
from shardmerge.sources.pickle_vm import interpret
from shardmerge.sources.zip_members import STORED, ZIP_MAGIC
from shardmerge.storage.listing import matching
from shardmerge.storage.packed import MOST_RATIO, PackedFile, Unpackers, frame_window, packed_item
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Box, Extent, FileStamp, Strided
from shardmerge.tensors.strides import in_order, span

_HEAD = 1024
# What torch says of an item that its ``ZStandard`` extension compressed (``_extension.py``), and a frame's own header.
_ZSTD, _FRAME_HEAD = "stream.zstd/1", 18
# Tensors of many axes have longer pickles: no torch tensor has more than 64 axes, of 18 bytes each here. And where
# ``storage_alignment`` is a page, each of the four members before the storage takes one.
LONGEST_HEAD = 32768
# Heads that are kept: a rank's chunks have as many shapes as the model has kinds of matrices.
_MOST_HEADS = 4096
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_DESCRIPTOR = b"PK\x07\x08"
# Signature, CRC and two sizes, of 4 or, in zip64, of 8 bytes.
_DESCRIPTORS = (16, 24)


class _Head(NamedTuple):
    """What the head of an item says: the tensor, and where its bytes begin in the item."""

    tensor: TensorRef
    begin: int


class ItemFiles:
    """Finds the bytes of chunks.

    Parameters
    ----------
    folder
        The checkpoint's directory.

    Attributes
    ----------
    paths
        Absolute path of each file, by its name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, SourceFile] = {}
        self._frames: dict[str, FileStamp] = {}
        self._unpackers = Unpackers(1)
        self._known: dict[bytes, _Head] = {}
        self._last = 0
        self.paths: dict[str, str] = {}

    def stamps(self) -> Iterator[FileStamp]:
        """Yields the stamp of every file that was opened, and of every frame in one."""
        yield from (FileStamp.of(file.path, file.status) for file in self._files.values())
        yield from self._frames.values()

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()

    def box(self, name: str, dtype: DType, chunk: StoredChunk) -> Box:
        """Returns a chunk with where its bytes are.

        Raises
        ------
        CheckpointError
            ``missing-chunk``: no item holds it. ``missing-rank``: the file is not there. ``truncated-file``: it ends
            before the item does. ``packed-item``, ``item-format``: the item is compressed, or none that torch writes.
            ``item-mismatch``: it is another tensor.
        """
        size = dtype.itemsize
        file = self._frame(name, chunk, prod(chunk.sizes) * size) if chunk.packed else self.part(name, chunk)
        head = self._head(file, chunk, name)
        if not _fits(head, dtype, chunk):
            raise _mismatch(head, dtype, chunk, self._where(name, chunk))
        offset = head.begin + (0 if isinstance(file, PackedFile) else chunk.begin)
        if in_order(head.tensor.shape, head.tensor.strides):
            return Box(chunk.offsets, chunk.sizes, Extent(file.path, offset, prod(chunk.sizes) * size))
        extent = Extent(file.path, offset, span(head.tensor.shape, head.tensor.strides) * size)
        return Box(chunk.offsets, chunk.sizes, Strided(extent, head.tensor.shape, head.tensor.strides))

    def object(self, name: str, chunk: StoredChunk, most: int) -> SourceFile:
        """Returns a whole item as a file, of an object of at most so many bytes; raises as ``box``."""
        return self._frame(name, chunk, 0).whole(most) if chunk.packed else self.part(name, chunk)

    def read(self, name: str, chunk: StoredChunk, extent: Extent) -> bytes:
        """Returns some bytes of the tensor of a chunk, of the extent that ``box`` gave."""
        file = self._frame(name, chunk, extent.nbytes) if chunk.packed else self._files[chunk.file]
        return file.read(extent.offset, extent.nbytes)

    def _frame(self, name: str, chunk: StoredChunk, nbytes: int) -> PackedFile:
        """Returns a compressed item as a file, which unpacks to more than so many bytes."""
        where = self._where(name, chunk)
        if chunk.packed != _ZSTD:
            raise packed_item(where, chunk.packed, _ZSTD)
        part = self.part(name, chunk)
        if nbytes > chunk.length * MOST_RATIO:
            raise packed_item(where, f"{chunk.length:,} bytes for {nbytes:,}", f"at most {MOST_RATIO:,} for one")
        window = frame_window(part.start(_FRAME_HEAD), nbytes, where)
        file = self._files[chunk.file]
        packed = PackedName(file.path, chunk.begin, chunk.length, window)
        place = str((chunk.begin, chunk.length)).encode()  # no bytes of the file, and none to compare
        self._frames[str(packed)] = replace(FileStamp.of(str(packed), file.status, place), header_nbytes=0)
        return PackedFile(file, packed, self._unpackers)

    def part(self, name: str, chunk: StoredChunk) -> FilePart:
        """Returns a whole item as a file, as it is stored; raises as ``box``."""
        file = self._open(name, chunk)
        if chunk.begin + chunk.length > file.size:
            raise _cut_short(file, chunk, name)
        return FilePart(file, chunk.begin, chunk.length)

    def _open(self, name: str, chunk: StoredChunk) -> SourceFile:
        if not chunk.file:
            raise CheckpointError(
                "missing-chunk",
                "the checkpoint lists a part of a tensor without its location",
                where=f"{self._folder}, {name[:200]}",
                found=f"a chunk {list(chunk.sizes)} at {list(chunk.offsets)} without an item",
                hint="a save that did not end, or one of several .metadata is missing: copy the directory again",
            )
        if chunk.file not in self._files:
            path = self._folder / chunk.file
            if not path.is_file():
                raise CheckpointError(
                    "missing-rank",
                    f"a file of the checkpoint is not there: {chunk.file}",
                    where=str(self._folder),
                    found=", ".join([item.name for item in matching(self._folder, "*.distcp")][:8]) or "no .distcp",
                    hint="every rank writes files of its own: bring all of them, and the hidden .metadata, together",
                )
            self._files[chunk.file] = SourceFile(path)
            self.paths[chunk.file] = str(path)
        return self._files[chunk.file]

    def _where(self, name: str, chunk: StoredChunk) -> str:
        return f"{self._folder / chunk.file}, byte {chunk.begin}, {name[:200]}"

    def _head(self, file: FilePart | PackedFile, chunk: StoredChunk, name: str) -> _Head:
        raw = file.start(_HEAD)
        known = self._known.get(raw[: self._last])
        if known is not None:
            return known
        head = _head_of(raw)
        if head is None:
            raw = file.start(LONGEST_HEAD)
            head = _head_of(raw)
        if head is None:
            whole = self._files[chunk.file]
            raise _not_an_item(raw, self._where(name, chunk), whole.read(0, min(16, whole.size)))
        if len(self._known) >= _MOST_HEADS:
            self._known.clear()
        self._last = head.begin
        self._known[raw[: head.begin]] = head
        return head


def item_end(raw: bytes) -> int:
    """Returns where the storage of an item ends, which begins with some bytes; 0 where they do not say it."""
    head = _head_of(raw)
    return 0 if head is None else head.begin + head.tensor.storage.numel * head.tensor.storage.dtype.itemsize


def _head_of(raw: bytes) -> _Head | None:
    """Returns what the head of an item says; None where it is no item, or not all of the head is there."""
    at, tensor = 0, None
    while True:
        member = _member(raw, at)
        if member is None:
            return None
        name, start = member
        if name.endswith("/data/0"):
            return _Head(tensor, start) if tensor is not None else None
        end, at = _end(raw, start)
        if not at:
            return None
        if name.endswith("/data.pkl"):
            tensor = _tensor(raw[start:end])
        elif name.endswith("/byteorder") and raw[start:end] != b"little":
            return None


def _member(raw: bytes, at: int) -> tuple[str, int] | None:
    """Returns the name of the member whose header is at a place, and where its bytes begin."""
    if len(raw) < at + _LOCAL.size:
        return None
    magic, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack_from(raw, at)
    start = at + _LOCAL.size + name_length
    if magic != ZIP_MAGIC or method != STORED or start + extra_length > len(raw):
        return None
    return raw[at + _LOCAL.size : start].decode("ascii", "replace"), start + extra_length


def _end(raw: bytes, start: int) -> tuple[int, int]:
    """Returns where a member's bytes end, and where the next header is: 0 where that is not in sight."""
    end = raw.find(_DESCRIPTOR, start)
    while end >= 0:
        for size in _DESCRIPTORS:
            if raw[end + size : end + size + 4] == ZIP_MAGIC:
                return end, end + size
        end = raw.find(_DESCRIPTOR, end + 1)
    return 0, 0


def _tensor(pickle: bytes) -> TensorRef | None:
    try:
        value = interpret(pickle, where="")
    except CheckpointError:
        return None
    return value if isinstance(value, TensorRef) else None


def _fits(head: _Head, dtype: DType, chunk: StoredChunk) -> bool:
    tensor = head.tensor
    nbytes = tensor.storage.numel * tensor.storage.dtype.itemsize
    return (
        (tensor.dtype, tensor.shape, tensor.offset, tensor.storage.key) == (dtype, chunk.sizes, 0, "0")
        and span(tensor.shape, tensor.strides) * dtype.itemsize <= nbytes
        and (head.begin + nbytes <= chunk.length or bool(chunk.packed))
    )


def _mismatch(head: _Head, dtype: DType, chunk: StoredChunk, where: str) -> CheckpointError:
    tensor = head.tensor
    return CheckpointError(
        "item-mismatch",
        "an item does not match its description in .metadata",
        where=where,
        found=f"{tensor.dtype.name} {list(tensor.shape)}, {tensor.storage.numel} numbers from byte {head.begin} on",
        expected=f"{dtype.name} {list(chunk.sizes)} in {chunk.length} bytes",
        hint="files of two saves are mixed: copy the directory again",
    )


def _cut_short(file: SourceFile, chunk: StoredChunk, name: str) -> CheckpointError:
    return CheckpointError(
        "truncated-file",
        "a file of the checkpoint ends before an item does",
        where=f"{file.path}, byte {chunk.begin}, {name[:200]}",
        found=f"{file.size} bytes",
        expected=f"at least {chunk.begin + chunk.length} bytes",
        hint="copy the file again; a checkpoint still being written looks like this too",
    )


def _not_an_item(raw: bytes, where: str, first: bytes) -> CheckpointError:
    if first[8:9] == b"{":
        return CheckpointError(
            "item-format",
            "the .distcp files are safetensors (serialization_format=SAFETENSORS), and their .metadata is wrong about "
            "where tensors lie: torch itself does not read them",
            where=where,
            found=f"first bytes {first!r}",
            hint="each file is a plain safetensors file of one rank's parts; save again without that option, or with "
            "HuggingFaceStorageWriter",
        )
    return CheckpointError(
        "item-format",
        "an item was not written by torch.save",
        where=where,
        found=f"first bytes {raw[:16]!r}",
        hint="copy the file again; a conjugated or sparse tensor is saved once more with resolve_conj() or to_dense()",
    )
