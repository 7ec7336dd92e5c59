"""What pins the files that a plan was made with: the run must meet the same ones, by name and by descriptor.

A stamp that travelled in a plan has no number that only the kernel can set: no device, inode, time of change. The
first look at the file adds them, so that from then on it is pinned as one that was planned with here.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.packed_names import container
from shardmerge.storage.reading import SourceFile, file_system
from shardmerge.system_errors import PASSING_READS, tried_again
from shardmerge.tensors import FileStamp

# Of a header that is compared, read at a time: it may have 100 MB.
_BLOCK = 1 << 20


class Pins:
    """Compares files with what they were when they were planned with. Safe for threads.

    Parameters
    ----------
    stamps
        Of the files; any other file is let pass.
    """

    def __init__(self, stamps: Iterable[FileStamp]) -> None:
        self._stamps = {stamp.path: stamp for stamp in stamps}
        self._opened: dict[str, None] = {}

    def check(self) -> None:
        """Looks at every file by its path, before anything is read and whenever something was odd.

        Raises
        ------
        CheckpointError
            ``source-changed``: one is gone, was written to, or replaced.
        """
        self._look(tuple(self._stamps))

    def check_opened(self) -> None:
        """Looks at every file that was opened, by its path, after a part was made of them; raises as ``check``."""
        self._look(tuple(self._opened))

    def opened(self, file: SourceFile) -> None:
        """Looks at a file that was just opened: what is read is the descriptor, whatever the path says later.

        The first time its header is compared too: one of the same size and time may have its tensors elsewhere.

        Raises
        ------
        CheckpointError
            ``source-changed``.
        """
        stamp = self._stamps.get(file.path)
        if stamp is None:
            return
        self._meet(stamp, file.status)
        if file.path not in self._opened and stamp.header_nbytes and _header(stamp, file) != stamp.header:
            raise source_changed(stamp, "another header under the same size and time")
        self._opened[file.path] = None

    def _look(self, paths: Iterable[str]) -> None:
        for path in paths:
            stamp = self._stamps[path]
            try:
                status = tried_again(Path(container(path)).stat, PASSING_READS)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise source_changed(stamp, "it is gone") from error
            self._meet(stamp, status)

    def _meet(self, stamp: FileStamp, status: os.stat_result) -> None:
        _compare(stamp, status)
        if not stamp.inode:
            self._stamps[stamp.path] = stamp.seen(status)


def _header(stamp: FileStamp, file: SourceFile) -> str:
    digest = hashlib.sha256()
    for at in range(0, stamp.header_nbytes, _BLOCK):
        digest.update(file.read(stamp.header_at + at, min(_BLOCK, stamp.header_nbytes - at)))
    return digest.hexdigest()


def _compare(stamp: FileStamp, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
        when = "meanwhile" if stamp.inode else _moment(status.st_mtime_ns)
        raise source_changed(stamp, f"{status.st_size} bytes, modified {when}")
    if not stamp.inode:  # of a plan that was written down, maybe elsewhere: no other number travels
        return
    if status.st_ctime_ns != stamp.ctime_ns:  # a program can set the time of modification, and not this one
        raise source_changed(stamp, f"{status.st_size} bytes, replaced or its attributes changed meanwhile")
    # FUSE file systems may make up the number of an inode whenever somebody asks anew.
    if (status.st_dev, status.st_ino) != (stamp.device, stamp.inode) and "fuse" not in file_system(
        container(stamp.path)
    ):
        raise source_changed(stamp, "another file of the same size under its name")


def source_changed(stamp: FileStamp, found: str) -> CheckpointError:
    """Returns the error of a file that is not the one that was planned with."""
    what, hint = "a source file changed while it was being read", "wait until whoever writes it is done, then run again"
    expected = f"{stamp.size} bytes, as when the plan was made"
    if not stamp.inode:  # of a plan that was written down
        what = "a source file is not the one that the plan was made with"
        expected = f"{stamp.size} bytes, modified {_moment(stamp.mtime_ns)}"
        hint = (
            "plan again: shardmerge plan MAPPING --out PLAN; files that were moved are found with --root OLD=NEW, "
            "copies of them need the same times (cp -p, rsync -t)"
        )
    return CheckpointError("source-changed", what, where=stamp.path, found=found, expected=expected, hint=hint)


def _moment(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f".{rest:09d}"
