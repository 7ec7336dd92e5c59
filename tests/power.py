"""A disk whose power can be cut: ext4 in a file, which EXT4_IOC_SHUTDOWN stops without writing anything down."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import tool

# The least that ext4 keeps of the order of things: data when it likes, and a rename for itself.
WRITEBACK = "data=writeback,noauto_da_alloc"


@dataclass(frozen=True, slots=True)
class PoweredDisk:
    """A file system that loses its power.

    Attributes
    ----------
    root
        Where it is mounted.
    """

    root: Path
    _image: Path
    _options: str

    def settle(self) -> None:
        """Writes everything down: from here on things may be lost."""
        subprocess.run(["sync", "-f", str(self.root)], check=True)

    def up_again(self) -> None:
        """Mounts it as after a power cut."""
        subprocess.run(["umount", str(self.root)], check=True)
        self.mount()

    def mount(self) -> None:
        command = ["mount", "-o", f"loop,{self._options}", str(self._image), str(self.root)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@contextmanager
def powered_disk(options: str = WRITEBACK) -> Iterator[PoweredDisk]:
    """Makes one of 64 MiB, in memory where there is a place for that."""
    if os.geteuid():
        pytest.skip("mounting takes root")
    mkfs = tool("mkfs.ext4")
    base = Path(tempfile.mkdtemp(prefix="shardmerge-power-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    disk = PoweredDisk(base / "root", base / "image", options)
    disk.root.mkdir()
    try:
        with (base / "image").open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(
            [mkfs, "-q", "-F", "-E", "lazy_itable_init=0", str(base / "image")], check=True, capture_output=True
        )
        disk.mount()
        try:
            yield disk
        finally:
            subprocess.run(["umount", "--lazy", str(disk.root)], check=False)
    finally:
        shutil.rmtree(base)
