"""The checksums in a ``.distcp`` file: items are whole zips one behind the other, each with a directory at its end.

Only ``.metadata`` says where items begin. The end of one says how long it is, so they are found from the last to the
first; what lies between two may be zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from shardmerge.sources.dcp_items import LONGEST_HEAD, item_end
from shardmerge.sources.file_part import FilePart
from shardmerge.sources.torch_zip import storage_records
from shardmerge.storage.packed import PackedFile
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Record

# The end record of a zip64, its locator, and the end record that every zip has (APPNOTE 6.3.10, 4.3.14 to 4.3.16).
_END64, _LOCATOR, _END = struct.Struct("<4sQHHIIQQQQ"), 20, 22
_TAIL = _END64.size + _LOCATOR + _END
# Between two items: a page at most, so that tensors can begin on one.
_GAP = 4096


def item_records(file: SourceFile) -> Iterator[Record]:
    """Yields the storages of all items with their checksums, from the last item to the first.

    It ends where something is no item: what has no checksum is not compared.
    """
    end = file.size
    while end > _TAIL:
        item = _last_item(file, end)
        if item is None:
            return
        yield from (record._replace(offset=item.begin + record.offset) for record in storage_records(item))
        end = item.begin


def packed_records(file: PackedFile) -> Iterator[Record]:
    """Yields the storage of a compressed item, with its checksum: at its end, so all of it is unpacked once."""
    end = item_end(file.start(LONGEST_HEAD))
    return storage_records(file.ends(LONGEST_HEAD, _GAP, least=end, most=end + _GAP))


def _last_item(file: SourceFile, end: int) -> FilePart | None:
    """Returns the item that ends last before a place."""
    start = max(end - _GAP - _TAIL, 0)
    raw = file.read(start, end - start).rstrip(b"\0")
    # The last two bytes of an end record are the length of a comment that torch does not write.
    stop = raw.rfind(b"PK\x05\x06") + _END
    if stop < _TAIL or stop < len(raw):
        return None
    record = start + stop - _TAIL
    fields = _END64.unpack(raw[stop - _TAIL : stop - _LOCATOR - _END])
    signature, size, offset = fields[0], fields[8], fields[9]
    begin = record - size - offset
    if signature != b"PK\x06\x06" or begin < 0:
        return None
    return FilePart(file, begin, start + stop - begin)
