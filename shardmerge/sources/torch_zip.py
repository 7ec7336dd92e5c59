"""The zip container of torch >= 1.6: where ``data.pkl`` and the storages lie.

Readers that differ on a crafted zip see different models in one file, so there is one canonical reading here:
the central directory, confirmed by each local header, without duplicates, overlaps or compressed storages
(``zip_directory``, ``zip_members``). Record names are those of ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from shardmerge.errors import CheckpointError
from shardmerge.sources.zip_directory import Member, check_names, read_directory
from shardmerge.sources.zip_errors import damaged, hostile
from shardmerge.sources.zip_members import STORED, find_payloads, unpack
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent, Record


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
    storages: ZipStorages
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
    check_names(file, members)
    payloads = find_payloads(file, members, directory)
    prefix = _prefix(file, members)
    _check_byte_order(file, prefix, payloads)
    name = f"{prefix}/data.pkl"
    member, offset = payloads[name]
    pickle = unpack(file, member, offset)
    storages = _storages(file, f"{prefix}/data/", payloads)
    return TorchZip(pickle, offset if member.method == STORED else 0, storages, prefix)


def storage_records(file: SourceFile) -> Iterator[Record]:
    """Yields the storages of a torch zip that was read before, with their checksums."""
    members, directory = read_directory(file)
    folder = f"{_prefix(file, members)}/data/"
    for name, (member, offset) in find_payloads(file, members, directory).items():
        if name.startswith(folder):
            yield Record(name, offset, member.size, member.crc)


def _prefix(file: SourceFile, members: list[Member]) -> str:
    """Returns the directory inside the zip, which all members share, of a file that ``torch.save`` wrote."""
    prefix = members[0].name.split("/", 1)[0]
    names = {member.name for member in members}
    folder, code = f"{prefix}/", f"{prefix}/code/"
    if not all(name.startswith(folder) for name in names):
        raise hostile("the members of the zip do not share one directory", file, 0, repr(prefix[:80]))
    if f"{prefix}/constants.pkl" in names or any(name.startswith(code) for name in names):
        raise CheckpointError(
            "torchscript",
            "this is a TorchScript archive: a program, not a checkpoint (OpenAI's own CLIP files are such)",
            where=file.path,
            hint="where it is trusted: " + _save_state(file.path),
        )
    if f"{prefix}/data.pkl" not in names or sum(name.endswith("/data.pkl") for name in names) != 1:
        raise hostile("the zip does not hold exactly one data.pkl", file, 0)
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
    order = unpack(file, member, offset, most=16) if member else b"little"
    if order == b"big":
        raise CheckpointError(
            "big-endian",
            "the checkpoint was written on a big-endian machine, which is not read",
            where=file.path,
            hint="load and save it once with torch on a little-endian machine",
        )
    if order != b"little":
        raise damaged("the byte order is neither little nor big", file, offset, repr(order))


@dataclass(frozen=True, slots=True)
class ZipStorages(Mapping[str, Extent]):
    """Storages by key; extents are made when asked for, since of most rank files one or two are."""

    path: str
    folder: str
    payloads: Mapping[str, tuple[Member, int]]

    def __getitem__(self, key: str) -> Extent:
        member, offset = self.payloads[self.folder + key]
        return Extent(self.path, offset, member.size)

    def checksum(self, key: str) -> int:
        """Returns the CRC-32 of a storage as the archive says it; 0 where it was written without."""
        return self.payloads[self.folder + key][0].crc

    def __iter__(self) -> Iterator[str]:
        return (name[len(self.folder) :] for name in self.payloads if name.startswith(self.folder))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _storages(file: SourceFile, folder: str, payloads: Mapping[str, tuple[Member, int]]) -> ZipStorages:
    for name, (member, offset) in payloads.items():
        if member.method != STORED and name.startswith(folder):
            raise CheckpointError(
                "compressed-storage",
                "the zip was compressed after torch wrote it, so tensors cannot be read by byte range",
                where=f"{file.path}, byte {offset}",
                found=name,
                hint="unpack it and store it again without compression (zip -0)",
            )
    return ZipStorages(file.path, folder, payloads)
