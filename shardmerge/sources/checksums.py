"""The records of a source file that carry checksums."""

from __future__ import annotations

from collections.abc import Iterable

from shardmerge.sources.dcp_records import item_records, packed_records
from shardmerge.sources.torch_zip import storage_records
from shardmerge.sources.zip_members import ZIP_MAGIC
from shardmerge.storage.packed import PackedFile
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Record


def read_records(file: SourceFile) -> Iterable[Record]:
    """Returns the storages of a torch zip, or of the many that a ``.distcp`` is; no other format has checksums."""
    if isinstance(file, PackedFile):
        return packed_records(file)
    if file.read(0, min(4, file.size)) != ZIP_MAGIC:
        return ()
    return item_records(file) if file.path.endswith(".distcp") else storage_records(file)
