"""What the files of a finished directory hold, by their own headers: tensors, the bytes around them, checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, UnreadableError, VerificationError
from shardmerge.execute.checksum import crc32
from shardmerge.execute.digests import Digester, Sums
from shardmerge.execute.gather import gather
from shardmerge.publish.recorded import RecordedTensor
from shardmerge.sources.safetensors_file import read_header
from shardmerge.sources.torch_checkpoint import read_torch_checkpoint
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.tensors import Extent, TensorEntry, dense

# Bytes of a tensor summed at a time.
_BLOCK = 4 << 20

# Tensors of a file, by the names in it.
HeldTensors: TypeAlias = Mapping[str, TensorEntry]


def held_tensors(folder: Path, name: str, tensors: Iterable[RecordedTensor]) -> HeldTensors:
    """Returns the tensors of a file of weights.

    Parameters
    ----------
    folder, name
        The directory, and the file in it.
    tensors
        Its tensors as the receipt lists them.

    Raises
    ------
    VerificationError
        The file cannot be read: a failed verification here, and not a refused input.
    """
    path = folder / name
    try:
        if path.suffix == ".safetensors":
            return {entry.name: entry for entry in read_header(path).entries.values()}
        if path.suffix == ".distcp":
            return dict(_items(path, tensors))
        catalog = read_torch_checkpoint(path)
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise VerificationError(error.code, error.what, where=error.where, found=error.found) from error
    return {name: catalog[name] for name in catalog.names()}


def _items(path: Path, tensors: Iterable[RecordedTensor]) -> Iterator[tuple[str, TensorEntry]]:
    """Yields the tensors of a file whose items have no names: as the receipt lists them, to be compared with the file.

    The names stand in ``.metadata``, whose digest is in the receipt.
    """
    for one in tensors:
        layout = dense(Extent(str(path), one.offset, one.nbytes), one.nbytes // one.dtype.itemsize)
        yield one.stored, TensorEntry(one.stored, one.dtype, one.shape, layout)


def frame_sha256(path: Path, tensors: Iterable[RecordedTensor]) -> str:
    """Returns the SHA-256 (hex) of all bytes of a file that are no tensor's."""
    places = sorted((tensor.offset, tensor.nbytes) for tensor in tensors)
    digest, cursor = hashlib.sha256(), 0
    with SourceFile(path) as file:
        for offset, nbytes in [*places, (file.size, 0)]:
            if nbytes or offset > cursor:
                end = min(max(cursor, offset), file.size)  # of a receipt that was forged
                digest.update(file.read(min(cursor, end), end - min(cursor, end)))
                cursor = offset + nbytes
    return digest.hexdigest()


def tensor_sums(pool: FilePool, entry: TensorEntry, *, sha256: bool = False) -> Sums:
    """Returns the CRC-32 of a tensor's bytes, and their SHA-256 where that is asked for."""
    total, digest = 0, hashlib.sha256()
    step = _BLOCK // entry.dtype.itemsize
    for start in range(0, entry.numel, step):
        data = bytearray(min(step, entry.numel - start) * entry.dtype.itemsize)
        gather(pool, entry, start, memoryview(data))
        total = crc32(data, total)
        if sha256:
            digest.update(data)
    return Sums(total, digest.hexdigest() if sha256 else "")


def file_digester(path: Path, tensors: Iterable[RecordedTensor], *, each: bool) -> Digester:
    """Returns what takes the SHA-256 of a file, and the sums of its tensors, each with a SHA-256 or without."""
    file = SourceFile(path)
    places = sorted((tensor.offset, tensor.nbytes, tensor.name) for tensor in tensors)
    return Digester(file.size, places, file.read_into, each=each)
