"""Small text files that name the newest checkpoint of a run: ``latest``, ``last_checkpoint``, tracker files."""

from __future__ import annotations

from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.storage.reading import SourceFile

# A path; what is longer names no checkpoint, and a sparse file of terabytes is no more work than this.
_LONGEST = 4096
# Bytes: NAME_MAX of Linux, macOS and Windows. Of a longer name the system says an error where it says of others that
# they are not there.
_LONGEST_NAME = 255


def read_marker(path: Path) -> str:
    """Returns what the first 4,096 bytes of a marker say, without blanks around it.

    Raises
    ------
    CheckpointError
        ``missing-tag``: it is not the name of any file. And what ``SourceFile`` raises.
    """
    with SourceFile(path) as file:
        text = file.read(0, min(file.size, _LONGEST)).decode("utf-8", "replace").strip()
    if "\0" in text or any(len(part.encode()) > _LONGEST_NAME for part in text.split("/")):
        raise CheckpointError(
            "missing-tag",
            f"'{path.name}' holds something else than the name of a checkpoint",
            where=str(path),
            found=repr(text[:80]),
            hint="pass the checkpoint itself",
        )
    return text
