"""A part of a file that is a file in itself: an item of a ``.distcp``."""

from __future__ import annotations

from shardmerge.storage.reading import SourceFile


class FilePart(SourceFile):
    """A part of an open file, read as if it were one; closing it is up to the file.

    Attributes
    ----------
    begin
        Where it begins in the file, in bytes.
    """

    def __init__(self, file: SourceFile, begin: int, nbytes: int) -> None:
        self.path, self.size, self.status = file.path, nbytes, file.status
        self.begin = begin
        self._file = file

    def start(self, nbytes: int) -> bytes:
        """Returns so many of the first bytes, fewer if the part ends."""
        return self.read(0, min(nbytes, self.size))

    def read(self, offset: int, nbytes: int) -> bytes:
        """Returns exactly ``nbytes`` bytes of the part."""
        return self._file.read(self.begin + offset, nbytes)
