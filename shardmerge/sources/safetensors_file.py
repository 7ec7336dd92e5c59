"""safetensors files: headers in, entries out.

The rules are those of the reference parser (``safetensors/src/tensor.rs``) and a few stricter ones where it lets two
readings of one file pass: duplicate keys, leading blanks, unknown fields.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardmerge.dtypes import DTYPES
from shardmerge.errors import CheckpointError, UnreadableError
from shardmerge.json_limits import weighed
from shardmerge.sources.lone_shard import refuse_slices
from shardmerge.sources.strict_json import strict_json
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Catalog, Extent, FileStamp, TensorEntry, dense
from shardmerge.tensors.file_roles import ADAPTER_METADATA

# MAX_HEADER_SIZE of the reference parser, in bytes.
_LARGEST_HEADER = 100_000_000
_LARGEST_RANK = 64
# No file system holds a larger file; keeps every product of a hostile shape an ordinary integer.
_LARGEST_SIZE = 1 << 48
_LONGEST_NAME = 4096
_UNPRINTABLE = re.compile("[\x00-\x1f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What the header of one file says.

    Attributes
    ----------
    entries
        In the order of their data.
    metadata
        The ``__metadata__`` object, empty where there is none.
    stamp
        Identity of the file; its digest covers the header.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    stamp: FileStamp


def is_safetensors(path: Path) -> bool:
    """Tells by content: a plausible header length followed by ``{``."""
    try:
        with SourceFile(path) as file:
            if file.size < 10:
                return False
            start = file.read(0, 9)
    except UnreadableError:  # that it is of another kind would be a guess
        raise
    except CheckpointError:
        return False
    length = struct.unpack("<Q", start[:8])[0]
    return 2 <= length <= _LARGEST_HEADER and start[8:9] == b"{"


def read_header(path: Path) -> SafetensorsHeader:
    """Reads and checks the header of one file; no tensor data.

    Raises
    ------
    CheckpointError
        ``truncated-file``, ``damaged-header`` with the file and the tensor's name.
    """
    with SourceFile(path) as file:
        length = _header_length(file)
        raw = file.read(8, length)
        stamp = FileStamp.of(str(path), file.status, raw, 8)
    fields = _parse(raw, str(path))
    metadata = _metadata(fields.pop("__metadata__", None), str(path))
    entries = [_entry(name, value, str(path), 8 + length) for name, value in fields.items()]
    entries.sort(key=_data_start)
    _check_tiling(entries, stamp, 8 + length)
    return SafetensorsHeader({entry.name: entry for entry in entries}, metadata, stamp)


def read_safetensors(path: Path) -> Catalog:
    """Returns the catalog of one safetensors file that holds whole tensors.

    Raises
    ------
    CheckpointError
        ``lone-shard``: it is a shard of torch's distributed safetensors under another name. And as ``read_header``.
    """
    header = read_header(path)
    refuse_slices(header.metadata, header.entries, str(path))
    facts = {key: text for key, text in header.metadata.items() if key == ADAPTER_METADATA}
    return Catalog(str(path), "safetensors", header.entries, files=(header.stamp,), facts=facts)


def _header_length(file: SourceFile) -> int:
    if file.size < 8:
        raise _damaged(file.path, "the file is shorter than the 8 bytes of its header length")
    length: int = struct.unpack("<Q", file.read(0, 8))[0]
    if length > _LARGEST_HEADER:
        raise _damaged(file.path, "the header length is impossible", f"{length} bytes", f"at most {_LARGEST_HEADER}")
    return length


def _parse(raw: bytes, path: str) -> dict[str, object]:
    if raw[:1] != b"{":
        raise _damaged(path, "the header does not start with '{'")
    try:
        value = strict_json(weighed(raw).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is not strict JSON: {error}") from error
    assert isinstance(value, dict)  # it begins with '{'
    return value


def _metadata(value: object, path: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _damaged(path, "__metadata__ is not an object of strings")
    return value


def _entry(name: str, value: object, path: str, data_start: int) -> TensorEntry:
    _check_name(name, path)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(str(value["dtype"]))
    if value["dtype"] == "":
        raise _unsaved(name, path)
    if dtype is None:
        raise _damaged(path, f"tensor {name!r} has an unknown dtype", str(value["dtype"]), ", ".join(DTYPES))
    shape = _integers(value["shape"], name, path)
    offsets = _integers(value["data_offsets"], name, path)
    if len(shape) > _LARGEST_RANK or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has an impossible shape or data_offsets")
    begin, end = offsets
    if end - begin != prod(shape) * dtype.itemsize:
        raise _damaged(
            path,
            f"tensor {name!r} has a size that is not its shape's",
            f"{end - begin} bytes",
            f"{prod(shape) * dtype.itemsize} bytes for {dtype} {list(shape)}",
        )
    extent = Extent(path, data_start + begin, end - begin)
    return TensorEntry(name, dtype, shape, dense(extent, prod(shape)) or _Nothing(extent), "safetensors")


class _Nothing(tuple[()]):
    """The pieces of an empty tensor, which still has a place in its file."""

    extent: Extent

    def __new__(cls, extent: Extent) -> _Nothing:
        pieces = super().__new__(cls)
        pieces.extent = extent
        return pieces


def _data_start(entry: TensorEntry) -> tuple[int, int]:
    extent = _extent(entry)
    return extent.offset, extent.nbytes


def _extent(entry: TensorEntry) -> Extent:
    held = entry.pieces.extent if isinstance(entry.pieces, _Nothing) else entry.pieces[0].held
    assert isinstance(held, Extent)  # safetensors has no strided tensors
    return held


def _check_name(name: str, path: str) -> None:
    if not name or len(name) > _LONGEST_NAME or _UNPRINTABLE.search(name):
        raise _damaged(path, f"impossible tensor name {name[:80]!r}")


def _integers(value: object, name: str, path: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in value):
        raise _damaged(path, f"tensor {name!r} has a shape or data_offsets that are not lists of plain sizes")
    return tuple(value)


def _check_tiling(entries: list[TensorEntry], stamp: FileStamp, data_start: int) -> None:
    """The format allows no holes, no overlaps and no trailing bytes."""
    cursor = data_start
    for entry in entries:
        extent = _extent(entry)
        if extent.offset != cursor:
            raise _damaged(
                stamp.path,
                f"tensor {entry.name!r} leaves a hole or overlaps its neighbour",
                f"data at byte {extent.offset}",
                f"byte {cursor}",
            )
        cursor += extent.nbytes
    if cursor > stamp.size:
        raise CheckpointError(
            "truncated-file",
            "the file ends before the data that its header announces",
            where=stamp.path,
            found=f"{stamp.size} bytes",
            expected=f"{cursor} bytes",
            hint="copy or download the file again",
        )
    if cursor < stamp.size:
        raise _damaged(stamp.path, "bytes follow the last tensor", f"{stamp.size} bytes", f"{cursor} bytes")


def _unsaved(name: str, path: str) -> CheckpointError:
    """Returns the error for what torch's consolidation writes of a name that no rank saved (torchtitan#3764)."""
    return CheckpointError(
        "damaged-header",
        f"tensor {name!r} has neither a type nor data: no rank saved it",
        where=path,
        found='dtype ""',
        expected=", ".join(DTYPES),
        hint="pass the shards that the file was consolidated from: the directory sharded/ beside it",
    )


def _damaged(path: str, what: str, found: str = "", expected: str = "") -> CheckpointError:
    return CheckpointError("damaged-header", what, where=path, found=found, expected=expected)
