"""What readers that are not ours find in the files of a finished directory."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from shardmerge.errors import ShardmergeError, VerificationError
from shardmerge.plan.dcp_layout import item_span
from shardmerge.plan.torch_pickle import tensor_pickle
from shardmerge.system_errors import about
from shardmerge.tensors import TensorEntry
from shardmerge.tensors.pieces import single_extent


def reference_problems(
    folder: Path, held: Mapping[str, Mapping[str, TensorEntry]], *, headers: bool = False
) -> Iterator[ShardmergeError]:
    """Yields what the reference reader of each file does not see as we do.

    Parameters
    ----------
    folder
        The directory.
    held
        By the name of a file in it, what it holds.
    headers
        Whether readers that read all of a file are left out.
    """
    for name, entries in held.items():
        with about(folder / name):
            if name.endswith(".safetensors"):
                yield from _safetensors(folder / name, entries)
            elif headers:
                continue
            elif name.endswith(".distcp"):
                yield from _items(folder / name, entries)
            else:
                yield from _zip(folder / name)


def _safetensors(path: Path, entries: Mapping[str, TensorEntry]) -> Iterator[ShardmergeError]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        yield _refused(f"the reference reader refuses a shard: {error}", path)
        return
    if shapes != {name: entry.shape for name, entry in entries.items()}:
        yield _differs("the reference reader sees other tensors", path)


def _zip(path: Path) -> Iterator[ShardmergeError]:
    """Python's zipfile compares the CRC of every record; torch itself would cost the memory that was saved."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except zipfile.BadZipFile as error:
        yield _refused(f"zipfile refuses a shard: {error}", path)
        return
    if damaged is not None:
        yield _differs(f"zipfile finds another CRC in {damaged}", path)


def _items(path: Path, entries: Mapping[str, TensorEntry]) -> Iterator[ShardmergeError]:
    """Every item of a distributed checkpoint is a zip by itself, which says type and shape of its tensor."""
    with path.open("rb") as file:
        for name, entry in entries.items():
            extent = single_extent(entry, 0, entry.numel)
            if extent is None:  # no elements: all of the item was compared with the receipt's digest
                continue
            try:
                with zipfile.ZipFile(_Window(file, *item_span(entry.dtype, entry.shape, extent.offset))) as item:
                    damaged = item.testzip()
                    said = item.read("archive/data.pkl")
            except (zipfile.BadZipFile, KeyError) as error:
                yield _refused(f"zipfile refuses the item of {name}: {error}", path)
                continue
            if damaged is not None:
                yield _differs(f"zipfile finds another CRC in {damaged} of {name}", path)
            elif said != tensor_pickle(entry.dtype, entry.shape):
                yield _differs(f"the item of {name} says another type or shape", path)


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        self._file, self._start, self._nbytes, self._at = file, start, nbytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._nbytes - self._at, 0)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def _refused(what: str, path: Path) -> VerificationError:
    return VerificationError("reference-refuses", what, where=str(path))


def _differs(what: str, path: Path) -> VerificationError:
    return VerificationError("reference-differs", what, where=str(path))
