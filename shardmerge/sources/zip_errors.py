"""What is wrong with a zip: damaged, as a copy that was cut short is, or made so that two readers differ."""

from __future__ import annotations

from shardmerge.errors import CheckpointError
from shardmerge.storage.reading import SourceFile

_AGAIN = "copy or download the file again; a checkpoint still being written looks like this too"


def damaged(what: str, file: SourceFile, at: int, found: str = "") -> CheckpointError:
    """Returns the error ``damaged-zip`` at a byte of the file."""
    return CheckpointError("damaged-zip", what, where=f"{file.path}, byte {at}", found=found, hint=_AGAIN)


def hostile(what: str, file: SourceFile, at: int, found: str = "") -> CheckpointError:
    """Returns the error ``hostile-zip`` at a byte of the file."""
    return CheckpointError("hostile-zip", what, where=f"{file.path}, byte {at}", found=found)


def cut_short(file: SourceFile) -> CheckpointError:
    """Returns the error ``truncated-file`` of a zip without its end record."""
    what = "the zip has no end record: the file is cut short"
    return CheckpointError("truncated-file", what, where=file.path, found=f"{file.size} bytes", hint=_AGAIN)
