"""The records of a source file that carry checksums."""

from __future__ import annotations

from collections.abc import Iterable

from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Record


def read_records(file: SourceFile) -> Iterable[Record]:
    """A torch zip has checksums of its storages; no other format does."""
    from shardmerge.sources.torch_zip import storage_records
    from shardmerge.sources.zip_members import ZIP_MAGIC

    return storage_records(file) if file.read(0, min(4, file.size)) == ZIP_MAGIC else ()
