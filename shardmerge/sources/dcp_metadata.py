"""The ``.metadata`` of torch's distributed checkpoint, read as it passes: names, boxes, and where the bytes are.

    Metadata {
      state_dict_metadata: {flat name: TensorStorageMetadata {properties, size, chunks} | BytesStorageMetadata}
      planner_data: {flat name: path}
      storage_data: {MetadataIndex {fqn, offset, index}: _StorageInfo {relative_path, offset, length}}
    }

Classes are those of ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` (torch 2.1 to 2.13); OLMo-core
and others have their own of the same names, so modules do not count. A chunk goes to a ``ChunkTable`` as soon as it is
complete, and nothing else is kept of it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.dtypes import BY_TORCH_NAME, DType
from shardmerge.errors import CheckpointError
from shardmerge.sources.dcp_runs import (
    CHUNK,
    INDEX_FIELDS,
    INFO_FIELDS,
    ITEM,
    OBJECT_MEMOS,
    NoMatchError,
    memo_number,
    size_of,
    state_of,
)
from shardmerge.sources.dcp_table import ChunkTable
from shardmerge.sources.pickle_bounds import are_sizes
from shardmerge.sources.pickle_errors import ACCIDENTS, AGAIN, damaged, hostile
from shardmerge.sources.pickle_machine import MOST_OPCODES, Machine, too_many_opcodes
from shardmerge.sources.pickle_stream import STEPS, StreamMachine
from shardmerge.sources.pickle_values import Global, Opaque, PickleValue, kind
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import FileStamp

# 405 billion parameters with Adam's moments on 1,024 ranks: 3.5 million chunks of 145 bytes.
_MOST_BYTES = 1 << 30
# Megatron's writer keeps all plans behind what is needed: as much again, and nothing that a reader wants.
_NOT_NEEDED = "all_local_plans"
# Values that rows refer to and that are kept: every row has six keys and a file, a rank writes into one or two files.
_MOST_KEPT = 4096
_GET_SIZES = {0x68: 2, 0x6A: 5}  # BINGET, LONG_BINGET


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """What one ``.metadata`` says.

    Attributes
    ----------
    table
        Tensors and chunks.
    paths
        Path of each name in what was saved: keys of dicts, indices of lists. None where nobody kept them.
    objects
        Names of what is no tensor.
    stamp
        Of the file. Its digest stays empty: what it says of the bytes is in the pieces.
    """

    table: ChunkTable
    paths: Mapping[str, tuple[object, ...]] | None
    objects: frozenset[str]
    stamp: FileStamp


def _no_object(name: str) -> bool:
    return False


def read_metadata(
    path: Path, keep: Callable[[str], bool], keep_object: Callable[[str], bool] = _no_object
) -> DcpMetadata:
    """Returns what a ``.metadata`` says.

    Parameters
    ----------
    path
        The file.
    keep, keep_object
        Tell by its flat name whether a tensor is wanted, or what is none.

    Raises
    ------
    CheckpointError
        ``hostile-pickle``, ``damaged-pickle``: as ``pickle_vm.interpret``; no ``Metadata``, or one that contradicts
        itself or names a file outside of its directory. ``unsupported-tensor``: an element type that is not known.
    """
    with SourceFile(path) as file:
        machine = _MetadataMachine(file, ChunkTable(keep, keep_object))
        try:
            state = machine.state()
        except CheckpointError as error:
            error.where = f"{path}, byte {machine.base + machine.op}"
            raise
        except (IndexError, KeyError, ValueError, struct.error) as error:
            what = f"the pickle is malformed: {ACCIDENTS.get(type(error), 'a bad name or text')}"
            where = f"{path}, byte {machine.base + machine.op}"
            raise CheckpointError("damaged-pickle", what, where=where, hint=AGAIN) from error
        return DcpMetadata(
            machine.table,
            _paths(state.get("planner_data")),
            _objects(state, machine.table),
            FileStamp.of(file.path, file.status),
        )


def _objects(state: Mapping[object, PickleValue], table: ChunkTable) -> frozenset[str]:
    named = state.get("state_dict_metadata")
    if not isinstance(named, dict) or not isinstance(state.get("storage_data"), dict):
        raise damaged(
            "this is no Metadata of a distributed checkpoint", ", ".join(str(key)[:40] for key in state)[:200]
        )
    known = table.tensors.keys() | table.dropped
    others = {str(name): value for name, value in named.items() if name not in known}
    for name, value in others.items():
        if not isinstance(value, Opaque) or value.type.name != "BytesStorageMetadata":
            raise damaged("an entry is neither a tensor nor an object", f"{name[:200]}: {kind(value)}")
    return frozenset(others)


def _paths(planned: PickleValue) -> Mapping[str, tuple[object, ...]] | None:
    if not isinstance(planned, dict) or not planned:
        return None
    return {str(name): path for name, path in planned.items() if isinstance(path, tuple)}


class _MetadataMachine(StreamMachine):
    """Steps through a file, window by window, and hands over chunks and items to a table.

    Attributes
    ----------
    table
        Where they go.
    """

    __slots__ = ("_chunk_keys", "_got", "_rows", "table")

    def __init__(self, file: SourceFile, table: ChunkTable) -> None:
        super().__init__(file)
        self.table = table
        self._rows: dict[bytes, Callable[[_MetadataMachine], bool]] = {}
        self._chunk_keys: tuple[bytes, ...] = ()
        self._got: dict[bytes, PickleValue] = {}
        if file.size > _MOST_BYTES:
            raise hostile("a .metadata larger than any checkpoint's", f"{file.size} bytes", f"at most {_MOST_BYTES}")

    def state(self) -> Mapping[object, PickleValue]:
        """Returns the fields of the ``Metadata``."""
        if self.data[:1] != b"\x80":
            raise damaged("not a pickle of protocol 2 to 5", repr(self.data[:4]))
        for _ in range(MOST_OPCODES):
            if self.pos >= self.edge:
                self.go_on()
            self.op = self.pos
            opcode = self.data[self.pos]
            size = _GET_SIZES.get(opcode)
            row = self._rows.get(self.data[self.pos : self.pos + size]) if size else None
            if row is not None and row(self):
                continue
            self.pos += 1
            if opcode == 0x2E:  # STOP
                made = self.result()
                if isinstance(made, Opaque) and isinstance(made.state, dict):
                    return made.state
                raise damaged("this is no Metadata of a distributed checkpoint")
            _STEPS[opcode](self)
            if len(self._marks) == 1 and len(self._stack) % 2 and self._stack[-1] == _NOT_NEEDED:
                return dict(zip(self._stack[:-1:2], self._stack[1::2], strict=True))
        raise too_many_opcodes()

    def memoize(self) -> None:
        """Numbers a value; of the two classes that come in rows it is noted how they are called from now on."""
        number = self._note()
        value = self._stack[-1]
        row = _IN_ROWS.get(value.name) if isinstance(value, Global) else None
        if row is not None:
            self._rows[b"j" + struct.pack("<I", number)] = row
            if number < 256:
                self._rows[b"h" + bytes([number])] = row

    def _get(self, raw: bytes) -> PickleValue:
        """Returns what a BINGET or LONG_BINGET in a row brings: keys and names of files, the same again and again."""
        value = self._got.get(raw)
        if value is None:
            value = self.recall(memo_number(raw))
            if len(self._got) >= _MOST_KEPT:
                self._got.clear()
            self._got[raw] = value
        return value

    # Rows

    def chunk_row(self) -> bool:
        """Reads chunks for as long as they follow each other."""
        found = CHUNK.match(self.data, self.pos, self._limit)
        if found is None:
            return False
        row = found[1]
        while found is not None and found[1] == row:
            self.op = self.pos
            keys = found.group(2, 4)
            if keys != self._chunk_keys:
                if [self._get(key) for key in keys] != ["offsets", "sizes"]:
                    return False
                self._chunk_keys = keys
            try:
                (offsets, first), (sizes, second) = self._size(found[3]), self._size(found[5])
            except NoMatchError:
                return False
            self._stack.append(self.table.box(offsets, sizes))
            self.skip(OBJECT_MEMOS + first + second, found.end())
            found = CHUNK.match(self.data, self.pos, self._limit)
        return True

    def _size(self, raw: bytes) -> tuple[tuple[int, ...], int]:
        numbers, memos = size_of(raw)
        if memos:
            return numbers, memos
        value = self._get(raw)
        if not are_sizes(value):
            raise NoMatchError
        return tuple(value), 0

    def item_row(self) -> bool:
        """Reads an item: what it is called, and where it lies."""
        found = ITEM.match(self.data, self.pos, self._limit)
        if found is None:
            return False
        try:
            fields = found.groups()
            (key, first), (info, second) = (state_of(fields[of], self._get) for of in (INDEX_FIELDS, INFO_FIELDS))
        except NoMatchError:
            return False
        self._item(key, info)
        self._stack += [None, None]
        self.skip(2 * OBJECT_MEMOS + first + second, found.end())
        return True

    # Objects, opcode by opcode

    def build(self) -> None:
        """BUILD; what is complete then goes to the table."""
        Machine.build(self)
        made = self._stack[-1]
        complete = _COMPLETE.get(made.type.name) if isinstance(made, Opaque) else None
        if complete is not None and isinstance(made, Opaque) and isinstance(made.state, dict):
            complete(self, made.state)

    def chunk(self, state: dict[object, Any]) -> None:
        """Hands over a chunk; where its numbers are stands for it from now on."""
        offsets, sizes = state.get("offsets"), state.get("sizes")
        if not are_sizes(offsets) or not are_sizes(sizes):
            raise damaged("a chunk has no offsets and sizes")
        self._stack[-1] = self.table.box(offsets, sizes)

    def tensor(self, state: dict[object, Any]) -> None:
        """Hands over a tensor, whose name is the key before it."""
        name, shape, chunks = self._stack[-2], state.get("size"), state.get("chunks")
        if not isinstance(name, str) or not are_sizes(shape) or not isinstance(chunks, list):
            raise damaged("a tensor has no name, size or list of chunks")
        if not all(type(box) is int for box in chunks):
            raise damaged("a chunk is something else", name[:200])
        self.table.tensor(name, _dtype(name, state.get("properties")), tuple(shape), chunks)
        self._stack[-1] = None

    def stored(self, state: dict[object, Any]) -> None:
        """Hands over an item, whose name is the key before it."""
        key = self._stack[-2]
        if not isinstance(key, Opaque) or not isinstance(key.state, dict):
            raise damaged("an item has no name")
        self._item(key.state, state)
        self._stack[-2:] = [None, None]

    def _item(self, key: Mapping[object, Any], info: Mapping[object, Any]) -> None:
        name, index, offset = key.get("fqn"), key.get("index"), key.get("offset")
        path, begin, length = (info.get(field) for field in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not isinstance(path, str) or type(begin) is not int or type(length) is not int:
            raise damaged("an item has no name, file, offset or length")
        packed = info.get("transform_descriptors")
        words = ", ".join(map(str, packed)) if isinstance(packed, (list, tuple)) else str(packed or "")
        if offset is None:
            self.table.add_object(name, path, begin, length, words[:80])
            return
        if not are_sizes(offset) or not (index is None or type(index) is int):
            raise damaged("an item's key is no place in a tensor", name[:200])
        self.table.item(name, tuple(offset), index, path, begin, length, words[:80])


def _dtype(name: str, properties: PickleValue) -> DType:
    """``TensorProperties`` pickles as a tuple that begins with the element type."""
    state = properties.state if isinstance(properties, Opaque) else None
    first = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):
        first = state.get("dtype")
    known = BY_TORCH_NAME.get(first.name) if isinstance(first, Global) and first.module == "torch" else None
    if known is None:
        found = first.path if isinstance(first, Global) else ""
        raise CheckpointError("unsupported-tensor", "a tensor of an unknown element type", where=name, found=found)
    return known


_IN_ROWS: dict[str, Callable[[_MetadataMachine], bool]] = {
    "ChunkStorageMetadata": _MetadataMachine.chunk_row,
    "MetadataIndex": _MetadataMachine.item_row,
}
_COMPLETE: dict[str, Callable[[_MetadataMachine, dict[object, Any]], None]] = {
    "ChunkStorageMetadata": _MetadataMachine.chunk,
    "TensorStorageMetadata": _MetadataMachine.tensor,
    "_StorageInfo": _MetadataMachine.stored,
}

_OWN: dict[int, Callable[[Any], None]] = {0x94: _MetadataMachine.memoize, 0x62: _MetadataMachine.build}
_STEPS = tuple(_OWN.get(opcode, step) for opcode, step in enumerate(STEPS))
