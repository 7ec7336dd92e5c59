"""What is in a directory: holes and blocks of zeros are not hashed, so that a sparse model of 16 GB is quick."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)

# SHA-256 of every file by its path; "" for a folder.
Content = dict[str, str]


def content(folder: Path) -> Content:
    """Returns what is in a directory. Of equal bytes it is equal, wherever there are holes."""
    return {
        path.relative_to(folder).as_posix(): "" if path.is_dir() else digest(path) for path in sorted(folder.rglob("*"))
    }


def digest(path: Path) -> str:
    """Returns a digest of a file's size, and of every block of it that is not zero and where it is."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        found.update(str(size).encode())
        while (at := _data(file.fileno(), at, size)) < size:
            block = os.pread(file.fileno(), _BLOCK, at)
            if block != _ZEROS[: len(block)]:
                found.update(b"%d:" % at + block)
            at += len(block)
    return found.hexdigest()


def _data(fd: int, at: int, size: int) -> int:
    """Returns where the block begins that holds the next data of a file."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA) // _BLOCK * _BLOCK if at < size else size
    except OSError:  # ENXIO: there is no more
        return size


def stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns what changes when anybody touches a file below a directory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode
    return found


def allocated(paths: list[Path]) -> int:
    """Returns how many bytes of disk these paths and all below them take; what goes meanwhile counts nothing."""
    total = 0
    for path in paths:
        for one in (path, *path.rglob("*")):
            try:
                total += one.lstat().st_blocks * 512
            except OSError:
                continue
    return total
