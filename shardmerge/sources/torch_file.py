"""A file that ``torch.save`` wrote: its values, and where the bytes of its tensors lie."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, ShardmergeError, UnreadableError
from shardmerge.sources.pickle_values import PickleValue, TensorRef
from shardmerge.sources.pickle_vm import interpret
from shardmerge.sources.torch_legacy import LEGACY_MAGIC, read_torch_legacy
from shardmerge.sources.torch_zip import ZipStorages, read_torch_zip
from shardmerge.sources.zip_directory import read_directory
from shardmerge.sources.zip_members import ZIP_MAGIC
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent, FileStamp, Piece, Strided, TensorEntry, dense

# Equal where two tensors have the same bytes; None where nothing in the file says.
ContentKey: TypeAlias = "tuple[object, ...] | None"

# Bytes of pickles whose values are kept: the values take about eight times as much. Ranks that share a node's GPUs
# write a few hundred KB in as many variants as there are GPUs.
_MOST_KNOWN = 4 << 20
# Records of the tar that torch <= 0.1.9 wrote (``torch/serialization.py``, ``legacy_load``).
_TAR_MEMBERS = (b"sys_info\0", b"pickle\0", b"tensors\0", b"storages\0")


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A torch file, headers only.

    Attributes
    ----------
    path
        Absolute path.
    kind
        ``"torch zip"`` or ``"torch legacy"``.
    root
        What was saved.
    storages
        Where each storage lies, by key.
    archive
        The name that the file was saved under, without its ending, where the container tells it (``TorchZip``).
    """

    path: str
    kind: str
    root: PickleValue
    storages: Mapping[str, Extent]
    stamp: FileStamp
    archive: str = ""

    def entry(self, name: str, ref: TensorRef, origin: str = "") -> TensorEntry:
        """Returns the catalog entry of a tensor: one dense extent, or a strided view of one.

        Raises
        ------
        CheckpointError
            ``missing-storage``, ``storage-size``: the bytes are not there, or not as many as the tensor's storage
            says. ``view-out-of-storage``: the tensor reaches over the end of its storage.
        """
        if 0 in ref.shape:  # nothing to read: torch lets its offset lie anywhere
            self._storage(name, ref)
            return TensorEntry(name, ref.dtype, ref.shape, (), origin)
        reach = sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True)) + 1
        extent = self._view(name, ref, reach)
        numel = prod(ref.shape)
        if _is_contiguous(ref):
            return TensorEntry(name, ref.dtype, ref.shape, dense(extent, numel), origin)
        piece = Piece(0, numel, Strided(extent, ref.shape, ref.strides))
        return TensorEntry(name, ref.dtype, ref.shape, (piece,), origin)

    def alias_key(self, ref: TensorRef) -> tuple[object, ...]:
        """Returns a key that is equal for two tensors that show the same bytes in the same way: tied weights."""
        return (ref.storage.key, ref.dtype.name, ref.offset, ref.shape, _telling_strides(ref))

    def content_key(self, ref: TensorRef) -> ContentKey:
        """Returns a key that is equal for tensors of two files only if these hold the same bytes, by the checksums."""
        storages = self.storages
        checksum = storages.checksum(ref.storage.key) if isinstance(storages, ZipStorages) else 0
        return (checksum, ref.storage.numel, *self.alias_key(ref)[1:]) if checksum else None

    def _view(self, name: str, ref: TensorRef, reach: int) -> Extent:
        """Returns the bytes from a tensor's first element on, ``reach`` elements, checked against its storage."""
        storage = self._storage(name, ref)
        start = ref.offset * ref.dtype.itemsize
        nbytes = reach * ref.dtype.itemsize
        if start + nbytes > storage.nbytes:
            raise CheckpointError(
                "view-out-of-storage",
                "a tensor extends beyond the end of its storage",
                where=f"{self.path}, {name}",
                found=f"bytes {start} to {start + nbytes}",
                expected=f"at most {storage.nbytes}",
            )
        return storage.slice(start, nbytes)

    def _storage(self, name: str, ref: TensorRef) -> Extent:
        extent = self.storages.get(ref.storage.key)
        if extent is None:
            raise CheckpointError(
                "missing-storage",
                "the file does not hold the storage of a tensor",
                where=f"{self.path}, {name}",
                expected=f"storage {ref.storage.key!r}",
            )
        expected = ref.storage.numel * ref.storage.dtype.itemsize
        if extent.nbytes != expected:
            raise CheckpointError(
                "storage-size",
                "a storage has another size than its tensor says",
                where=f"{self.path}, {name}, byte {extent.offset}",
                found=f"{extent.nbytes} bytes",
                expected=f"{expected} bytes",
            )
        return extent


def _telling_strides(ref: TensorRef) -> tuple[int, ...]:
    """Strides, 0 where the dimension has one element and the stride says nothing."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(ref.shape, ref.strides, strict=True))


def _is_contiguous(ref: TensorRef) -> bool:
    expected = 1
    for size, stride in zip(reversed(ref.shape), reversed(ref.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


# Files


def is_torch_file(path: Path) -> bool:
    """Tells by content whether ``torch.save`` wrote a file; a damaged torch file is still one.

    Raises
    ------
    CheckpointError
        ``unreadable-file``.
    """
    try:
        with SourceFile(path) as file:
            head = file.read(0, min(512, file.size))
            return _is_legacy(head) or _is_tar(head) or _is_zip(head, file)
    except UnreadableError:  # that it is of another kind would be a guess
        raise
    except (ShardmergeError, ValueError):
        return False


def _is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and LEGACY_MAGIC in head[:32]


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar" and head.startswith(_TAR_MEMBERS)


def _is_zip(head: bytes, file: SourceFile) -> bool:
    if not head.startswith(ZIP_MAGIC):
        return False
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b"/data.pkl"):  # torch writes it first
        return True
    return any(member.name.endswith("/data.pkl") for member in read_directory(file)[0])


class KnownPickles:
    """Values of pickles read lately, by the SHA-256 of their bytes: files of many ranks differ in little else.

    What is interpreted once is the same value ever after: values are never changed. Bounded, since nothing says that
    the next file is like the last.
    """

    def __init__(self) -> None:
        self._values: OrderedDict[str, tuple[PickleValue, int]] = OrderedDict()
        self._held = 0

    def get(self, digest: str) -> PickleValue | None:
        """Returns the value of a pickle, or None if it is not known."""
        found = self._values.get(digest)
        return found[0] if found else None

    def put(self, digest: str, value: PickleValue, nbytes: int) -> None:
        """Remembers the value of a pickle of so many bytes; forgets the oldest where there are too many."""
        self._values[digest] = value, nbytes
        self._held += nbytes
        while self._held > _MOST_KNOWN:
            self._held -= self._values.popitem(last=False)[1][1]


def read_torch_file(path: Path, known: KnownPickles | None = None) -> TorchFile:
    """Returns what a torch file holds. Reads its headers, not its tensors, and executes nothing.

    Parameters
    ----------
    path
        The file.
    known
        Where values of equal pickles are taken from, for files of one set.

    Raises
    ------
    CheckpointError
        What ``read_torch_zip``, ``read_torch_legacy`` and ``interpret`` raise; ``torch-tar``: a file of torch before
        0.1.10; ``not-torch``: anything else.
    """
    with SourceFile(os.path.abspath(path)) as file:  # noqa: PTH100  # resolve() would follow links
        head = file.read(0, min(512, file.size))
        if head.startswith(ZIP_MAGIC):
            return _from_zip(file, known or KnownPickles())
        if _is_legacy(head):
            return _from_legacy(file)
        if _is_tar(head):
            raise CheckpointError(
                "torch-tar",
                "this is a tar file of torch before 0.1.10, which is not read",
                where=file.path,
                hint="load and save it once with a torch of today, where it is trusted",
            )
        raise CheckpointError(
            "not-torch", "not a file that torch.save wrote", where=file.path, found=f"first bytes {head[:8]!r}"
        )


def _from_zip(file: SourceFile, known: KnownPickles) -> TorchFile:
    parts = read_torch_zip(file)
    stamp = FileStamp.of(file.path, file.status, parts.pickle, parts.pickle_offset)
    root = known.get(stamp.header)
    if root is None:
        root = interpret(parts.pickle, where=file.path, base=parts.pickle_offset)
        known.put(stamp.header, root, len(parts.pickle))
    return TorchFile(file.path, "torch zip", root, parts.storages, stamp, parts.archive)


def _from_legacy(file: SourceFile) -> TorchFile:
    parts = read_torch_legacy(file)
    stamp = FileStamp.of(file.path, file.status, parts.header)
    return TorchFile(file.path, "torch legacy", parts.root, parts.storages, stamp)
