"""The container of torch before 1.6 (``torch/serialization.py``, ``_legacy_save``), still written on request.

Five pickles stand one after the other: a magic number, the protocol version, facts about the machine, the object,
the list of storage keys. Then for each key, in the order of the list, an int64 element count and the raw bytes: where
a storage lies is only known by stepping over those before it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_frames import MOST_PICKLE_BYTES
from shardmerge.sources.pickle_values import Parsed, PickleValue, StorageRef
from shardmerge.sources.pickle_vm import interpret_at
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent

_MAGIC = 0x1950A86A20F9469CFC6C
# LONG1 of ten bytes; PROTO, and from protocol 4 on FRAME, stand before it.
LEGACY_MAGIC = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little")
_PROTOCOL = 1001
_COUNT = struct.Struct("<q")

# Most files' pickles fit into the first window; each next one is larger, up to the largest pickle that is read.
_FIRST_WINDOW = 1 << 20
_WINDOW_GROWTH = 16


@dataclass(frozen=True, slots=True)
class TorchLegacy:
    """The parts of a legacy file: the object, all storages by key, and the bytes before the first of them."""

    root: PickleValue
    storages: Mapping[str, Extent]
    header: bytes


def read_torch_legacy(file: SourceFile) -> TorchLegacy:
    """Returns the parts of a legacy file.

    Raises
    ------
    CheckpointError
        What ``interpret`` raises; ``big-endian``; ``damaged-legacy``: storages that are missing, doubled or of another
        length than the object says, or bytes after the last one; ``truncated-file``.
    """
    window = _FIRST_WINDOW
    while True:
        data = file.read(0, min(window, file.size))
        try:
            parsed, keys, start = _pickles(data, file)
        except CheckpointError as error:
            if error.code != "damaged-pickle" or len(data) == file.size or window > MOST_PICKLE_BYTES:
                raise  # a larger window would not help: nothing was cut off by this one
            window *= _WINDOW_GROWTH
        else:
            return TorchLegacy(parsed.value, _storages(file, parsed.storages, keys, start), data[:start])


def _pickles(data: bytes, file: SourceFile) -> tuple[Parsed, list[str], int]:
    """Returns the object, the keys, and where the first storage begins."""
    magic = interpret_at(data, 0, where=file.path)
    protocol = interpret_at(data, magic.end, where=file.path)
    machine = interpret_at(data, protocol.end, where=file.path)
    if magic.value != _MAGIC or protocol.value != _PROTOCOL:
        raise _damaged("not a torch file of the known protocol", file, 0, f"protocol {_short(protocol.value)}")
    _check_machine(file, machine)
    parsed = interpret_at(data, machine.end, where=file.path, legacy=True)
    keys = interpret_at(data, parsed.end, where=file.path)
    if not isinstance(keys.value, list):
        raise _damaged("the list of storages is not a list", file, parsed.end)
    names = [key for key in keys.value if isinstance(key, str)]
    if len(names) != len(keys.value) or len(set(names)) != len(names) or set(names) != set(parsed.storages):
        raise _damaged("the list of storages is not that of the storages in use", file, parsed.end)
    return parsed, names, keys.end


def _short(value: PickleValue) -> str:
    return str(value) if isinstance(value, int) else type(value).__name__


def _check_machine(file: SourceFile, machine: Parsed) -> None:
    facts = machine.value
    little = facts.get("little_endian") if isinstance(facts, dict) else None
    if little is False:
        raise CheckpointError(
            "big-endian",
            "the checkpoint was written on a big-endian machine, which is not read",
            where=file.path,
            hint="load and save it once with torch on a little-endian machine",
        )
    if little is not True:
        raise _damaged("the file does not say its byte order", file, machine.end)


def _storages(file: SourceFile, refs: Mapping[str, StorageRef], keys: list[str], start: int) -> dict[str, Extent]:
    storages = {}
    for key in keys:
        (count,) = _COUNT.unpack(file.read(start, _COUNT.size))
        ref = refs[key]
        if count != ref.numel:
            raise _damaged("a storage has another length than the object says", file, start, f"{count} elements")
        extent = Extent(file.path, start + _COUNT.size, ref.numel * ref.dtype.itemsize)
        start = extent.offset + extent.nbytes
        if start > file.size:
            raise CheckpointError(
                "truncated-file",
                "the file ends inside a storage",
                where=f"{file.path}, byte {extent.offset}",
                found=f"{file.size} bytes",
                expected=f"at least {start} bytes",
                hint="copy or download the file again; a checkpoint still being written looks like this too",
            )
        storages[key] = extent
    if start != file.size:
        raise _damaged("bytes follow the last storage", file, start, f"{file.size - start} bytes")
    return storages


def _damaged(what: str, file: SourceFile, at: int, found: str = "") -> CheckpointError:
    return CheckpointError("damaged-legacy", what, where=f"{file.path}, byte {at}", found=found)
