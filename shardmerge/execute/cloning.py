"""Clones what a plan lets be cloned, and says what is left to be moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardmerge.plan.clones import BLOCK, Clone, clones
from shardmerge.plan.shard import PlannedShard
from shardmerge.storage.cloning import can_clone, clone_range
from shardmerge.storage.reading import FilePool
from shardmerge.storage.writing import OutputFile


def clone_shard(shard: PlannedShard, file: OutputFile, pool: FilePool) -> tuple[Clone, ...]:
    """Clones what can be cloned of a shard and returns it, ascending; the rest is to be streamed.

    Raises
    ------
    UsageError, CheckpointError
        A source cannot be opened.
    """
    done = []
    for one in clones(shard):
        source = pool.get(one.file)
        if clone_range(source.fileno(), one.start, file.fileno(), one.offset, one.nbytes):
            done.append(one)
    return tuple(done)


def clonable_bytes(shards: Sequence[PlannedShard], out: Path) -> int:
    """Returns how many bytes of some parts the file system of ``out`` would clone, by trying one block of each device.

    Nothing is read, and nothing is written that anybody could see. A run tries every range itself, and may clone more.
    """
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    files: dict[str, bool] = {}
    devices: dict[int, bool] = {}
    total = 0
    for one in (one for shard in shards for one in clones(shard)):
        if one.file not in files:
            device = _device(one.file)
            if device not in devices:
                devices[device] = can_clone(one.file, one.start, BLOCK, folder)
            files[one.file] = devices[device]
        total += one.nbytes if files[one.file] else 0
    return total


def _device(file: str) -> int:
    try:
        return Path(file).stat().st_dev
    except OSError:
        return -1
