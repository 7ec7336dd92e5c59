"""What may become of a source file while it is read: by hand, by a training run, by a tool that synchronises."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType


def truncate(path: Path) -> None:
    """To half its size: most of what is still to be read is gone."""
    os.truncate(path, path.stat().st_size // 2)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def overwrite(path: Path) -> None:
    """In place, from the middle on; the size stays."""
    with path.open("r+b") as file:
        half = file.seek(path.stat().st_size // 2)
        data = file.read()
        file.seek(half)
        file.write(data.translate(_OTHER))


def replace(path: Path) -> None:
    """By a rename, with the same times, as ``rsync --times`` and editors do."""
    other = path.with_name(f"{path.name}.other")
    shutil.copy2(path, other)
    forge(other)
    other.rename(path)


def delete(path: Path) -> None:
    path.unlink()


def forbid(path: Path) -> None:
    path.chmod(0)


def forge(path: Path) -> None:
    """Other bytes, the same size, and the time of modification put back: ``touch -r``, ``rsync --times --inplace``."""
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Digits and letters become others, so that text stays text of the same length: JSON stays JSON.
_OTHER = bytes.maketrans(b"0123456789", b"1234567890")

MUTATIONS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        "truncated": truncate,
        "appended to": append,
        "overwritten": overwrite,
        "replaced by a rename": replace,
        "deleted": delete,
        "mode 000": forbid,
        "overwritten, time put back": forge,
    }
)
