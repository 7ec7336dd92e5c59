"""Disks whose power can be cut: ext4 or XFS in a file.

Both have a call (EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN) that stops a file system without writing anything more down; the
journal too is lost from its last commit on, or, where that is asked for, kept without the data that belongs to it.
Linux has no such call for btrfs; to copy a file that a mounted btrfs may be writing to is no cut at one moment.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import tool
from tests.killing import POWER, Trap

_SHUTDOWN = 0x8004587D
# What becomes of the journal: EXT4_GOING_FLAGS_LOGFLUSH, EXT4_GOING_FLAGS_NOLOGFLUSH; those of XFS are the same.
JOURNAL_KEPT, JOURNAL_LOST = 1, 2


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of disk.

    Attributes
    ----------
    make
        The command that makes the file system.
    size
        In MiB; the least that it can be, or little more.
    options
        How it is mounted.
    """

    make: tuple[str, ...]
    size: int
    options: str


_EXT4 = ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0")
DISKS = {
    "ext4 ordered": Kind(_EXT4, 64, "data=ordered"),
    # The least that ext4 keeps of the order of things: data when it likes, and a rename for itself.
    "ext4 writeback": Kind(_EXT4, 64, "data=writeback,noauto_da_alloc"),
    "XFS": Kind(("mkfs.xfs", "-q", "-m", "reflink=1"), 300, "nouuid"),
}
WRITEBACK = "ext4 writeback"


@dataclass(frozen=True, slots=True)
class PoweredDisk:
    """A file system that loses its power.

    Attributes
    ----------
    root
        Where it is mounted.
    kind
        What it is.
    """

    root: Path
    kind: Kind
    _image: Path

    def settle(self) -> None:
        """Writes everything down: from here on things may be lost."""
        subprocess.run(["sync", "-f", str(self.root)], check=True)

    def trap(self, at: int, journal: int = JOURNAL_LOST, skip: int = 0) -> Trap:
        """Returns what cuts the power before a call; ``cut`` does the rest."""
        return Trap(POWER, at=at, number=journal, mount=str(self.root), skip=skip)

    def cut(self, journal: int = JOURNAL_LOST) -> None:
        """Cuts the power now, or does what is left to do after a trap, and mounts what is there then.

        It is a copy that is mounted: a mount namespace that somebody made meanwhile may still hold what was stopped.
        """
        self._stop(journal)
        subprocess.run(["cp", "--sparse=always", str(self._image), f"{self._image}.cut"], check=True)
        subprocess.run(["umount", str(self.root)], check=True)
        Path(f"{self._image}.cut").rename(self._image)
        self.mount()

    def _stop(self, journal: int) -> None:
        """Once more where it is stopped already, which ext4 allows; XFS does not open anything then."""
        try:
            fd = os.open(self.root, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("=I", journal))
        finally:
            os.close(fd)

    def mount(self) -> None:
        command = ["mount", "-o", f"loop,{self.kind.options}", str(self._image), str(self.root)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@contextmanager
def powered_disk(name: str = WRITEBACK) -> Iterator[PoweredDisk]:
    """Makes one, in memory where there is a place for that."""
    if os.geteuid():
        pytest.skip("mounting takes root")
    kind = DISKS[name]
    command = [tool(kind.make[0]), *kind.make[1:]]
    base = Path(tempfile.mkdtemp(prefix="shardmerge-power-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    disk = PoweredDisk(base / "root", kind, base / "image")
    disk.root.mkdir()
    try:
        with (base / "image").open("wb") as file:
            file.truncate(kind.size << 20)
        subprocess.run([*command, str(base / "image")], check=True, capture_output=True)
        disk.mount()
        try:
            yield disk
        finally:
            subprocess.run(["umount", "--lazy", str(disk.root)], check=False)
    finally:
        shutil.rmtree(base)
