"""Names in directories. ``Path.glob`` and ``os.walk`` take a directory that cannot be listed for an empty one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path


def matching(folder: Path, pattern: str) -> list[Path]:
    """Returns what matches in a directory, sorted; nothing where there is no such directory.

    Raises
    ------
    OSError
        The system refused to list it.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208  # names are all that is wanted
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no file can have such a name
        return []
    return sorted(folder / name for name in names if fnmatchcase(name, pattern))


def files_below(folder: Path) -> Iterator[Path]:
    """Yields all that is below a directory and is no directory; raises as ``matching``."""
    for place, _, names in os.walk(folder, onerror=_raised):
        yield from (Path(place, name) for name in names)


def without_links(path: Path) -> Path:
    """Returns a path without symbolic links. Of a circle of them ``Path.resolve`` says ``RuntimeError`` before 3.13.

    Raises
    ------
    OSError
        The links lead in a circle.
    """
    try:
        return path.resolve()
    except RuntimeError as error:
        if isinstance(error, RecursionError):  # one of ours, and of no link
            raise
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def _raised(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
