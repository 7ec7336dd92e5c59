"""Names in directories. ``Path.glob`` and ``os.walk`` take a directory that cannot be listed for an empty one."""

from __future__ import annotations

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


def _raised(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
