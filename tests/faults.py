"""Real faults: a volume that cannot hold what it promises, system calls that fail. Skips where a tool is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

# mkfs and losetup are where ordinary users do not look.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_MIB = 1 << 20


def tool(name: str) -> str:
    """Returns the path of a tool, or skips the test."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        pytest.skip(f"takes {name}")
    return found


@dataclass(frozen=True, slots=True)
class ThinVolume:
    """A mounted file system that says it has more room than what stands behind it.

    Attributes
    ----------
    root
        Where it is mounted.
    """

    root: Path
    _ballast: Path

    def give_room(self, file: Path) -> None:
        """Waits until all that was written to a file has been tried, and makes room: the error of writing passes.

        The error that the descriptor made here meets is its own, and takes none from whoever writes.
        """
        fd = os.open(file, os.O_RDONLY)
        with suppress(OSError):
            os.fdatasync(fd)
        os.close(fd)
        self._ballast.unlink(missing_ok=True)


@contextmanager
def thin_volume(behind: int) -> Iterator[ThinVolume]:
    """A loop device over a sparse file of 256 MiB, for which there is room of about ``behind`` bytes.

    As on a thin pool of LVM or a disk image of a virtual machine, writing fails when the page cache is written out.
    """
    if os.geteuid():
        pytest.skip("mounting takes root")
    mkfs = tool("mkfs.ext4")
    base = Path(tempfile.mkdtemp(prefix="shardmerge-thin-"))
    pool, root = base / "pool", base / "root"
    pool.mkdir()
    root.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={256 * _MIB}", "tmpfs", pool)
    try:
        image = pool / "image"
        with image.open("wb") as file:
            file.truncate(512 * _MIB)
        # Without a journal all that fails is the data.
        options = ["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=0"]
        subprocess.run([mkfs, *options, str(image)], check=True, capture_output=True)
        _mount("-o", "loop", image, root)
        try:
            os.sync()
            ballast = pool / "ballast"
            room = os.statvfs(pool).f_bavail * os.statvfs(pool).f_frsize - behind
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, room)
            yield ThinVolume(root, ballast)
        finally:
            subprocess.run(["umount", "--lazy", str(root)], check=False)
    finally:
        subprocess.run(["umount", "--lazy", str(pool)], check=False)
        root.rmdir()
        pool.rmdir()
        base.rmdir()


def _mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
