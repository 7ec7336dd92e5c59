"""A small file of the output, and who reads the ones that it is copied from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.tensors.entries import Extent

# Targets open no files: whoever calls them passes the function that reads a side file's bytes.
ReadSideFile: TypeAlias = Callable[[Extent], bytes]


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small file of the output directory.

    Attributes
    ----------
    name
        Where it stands inside the output directory: ``tokenizer.json``, ``projector/config.json``.
    parts
        Its content in order: bytes made here, or extents of source files copied as they are.
    """

    name: str
    parts: tuple[bytes | Extent, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.parts)

    def content(self, read: ReadSideFile) -> bytes:
        """Returns the bytes, those of extents as ``read`` gives them."""
        return b"".join(part if isinstance(part, bytes) else read(part) for part in self.parts)
