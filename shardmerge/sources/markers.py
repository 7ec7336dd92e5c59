"""Small text files that name the newest checkpoint of a run: ``latest``, ``last_checkpoint``, tracker files."""

from __future__ import annotations

from pathlib import Path

from shardmerge.storage.reading import SourceFile

# A path; what is longer names no checkpoint, and a sparse file of terabytes is no more work than this.
_LONGEST = 4096


def read_marker(path: Path) -> str:
    """Returns what the first 4,096 bytes of a marker say, without blanks around it; raises as ``SourceFile``."""
    with SourceFile(path) as file:
        return file.read(0, min(file.size, _LONGEST)).decode("utf-8", "replace").strip()
