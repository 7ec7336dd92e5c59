"""What a part is made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from shardmerge.execute.records import ReadRecords, no_records
from shardmerge.storage.reading import IoMode

# Where casts are made; everything else is done by the CPU.
Device: TypeAlias = Literal["cpu", "cuda"]


def check_device(device: Device) -> None:
    """Raises ``device-unavailable`` where casts cannot be made on a device."""
    if device == "cuda":
        from shardmerge.execute.gpu import require_cuda

        require_cuda()


@dataclass(frozen=True, slots=True)
class Means:
    """What a part is made with; none of it changes a byte.

    Attributes
    ----------
    threads, tile
        As ``plan.schedule`` says.
    io
        How sources are read.
    bounded
        Whether pages of files leave the page cache behind the cursor.
    sync
        Whether the part is synced before its first bytes are written.
    device
        Where casts are made.
    records
        Gives the records of a source file that have checksums there.
    sha256
        Whether the SHA-256 of the part and of its tensors is taken.
    """

    threads: int = 1
    tile: int = 1 << 20
    io: IoMode = "pread"
    bounded: bool = False
    sync: bool = True
    device: Device = "cpu"
    records: ReadRecords = no_records
    sha256: bool = False
