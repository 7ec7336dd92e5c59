"""Names of compressed streams inside files: an item of a checkpoint that is a zstd frame is read as a file of its own.

``/ckpt/__0_0.distcp::zstd:704:1200:2097152``: 1,200 bytes of the file, from byte 704 on, are the frame, and unpacking
it takes a window of 2 MiB. The name is all that a plan says of it, and all that a reader needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PACKED = re.compile(r"(.+)::zstd:(\d{1,19}):(\d{1,19}):(\d{1,10})", re.DOTALL)
_SIGN = "::zstd:"


@dataclass(frozen=True, slots=True)
class PackedName:
    """A frame in a file.

    Attributes
    ----------
    file
        Absolute path.
    begin, length
        Where the frame lies in the file, in bytes.
    window
        Bytes that its reader has to look back on.
    """

    file: str
    begin: int
    length: int
    window: int

    def __str__(self) -> str:
        return f"{self.file}{_SIGN}{self.begin}:{self.length}:{self.window}"


def packed_name(path: str) -> PackedName | None:
    """Returns what a name says, None for the path of a file."""
    match = _PACKED.fullmatch(path) if _SIGN in path else None
    return None if match is None else PackedName(match[1], int(match[2]), int(match[3]), int(match[4]))


def container(path: str) -> str:
    """Returns the path of the file that a name leads into, or the path itself."""
    name = packed_name(path)
    return path if name is None else name.file
