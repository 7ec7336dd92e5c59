"""Sharing blocks between files: FICLONERANGE, which clones or fails, and never copies in silence.

``copy_file_range`` clones too where it can (Linux tries that first), and copies through the kernel where it cannot:
bytes that nobody has summed, at no better speed than a read and a write.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from shardmerge.storage.descriptors import opened

# linux/fs.h: _IOW(0x94, 13, struct file_clone_range {__s64 src_fd; __u64 src_offset, src_length, dest_offset;}).
_FICLONERANGE = 0x4020940D
_RANGE = struct.Struct("=qQQQ")


def clone_range(source: int, start: int, target: int, offset: int, nbytes: int) -> bool:
    """Makes a range of a file share the blocks of another, and tells whether that worked.

    Whatever the reason of a failure (another file system, one that cannot clone, larger blocks, checksums or
    encryption set otherwise, no space for metadata), the bytes can still be copied, and a copy names what is wrong.
    Dirty pages of the source are written out first by the kernel, so a clone is as durable as its metadata.

    Parameters
    ----------
    source, target
        Descriptors, open for reading and for writing.
    start, offset
        Where in either file, in bytes; whole blocks.
    nbytes
        Whole blocks.
    """
    try:
        fcntl.ioctl(target, _FICLONERANGE, _RANGE.pack(source, start, nbytes, offset))
    except OSError:
        return False
    return True


def can_clone(source: str | Path, start: int, nbytes: int, folder: Path) -> bool:
    """Tells whether a range of a file could be cloned into a new file of a directory, by doing it to a nameless one.

    Nothing is left behind, and nothing is ever to be seen. Where files without a name cannot be made (NFS) the answer
    is no.
    """
    nameless = os.O_WRONLY | os.O_TMPFILE
    try:
        with opened(source, os.O_RDONLY | os.O_NONBLOCK) as read, opened(folder, nameless, 0o600) as write:
            return clone_range(read.fileno(), start, write.fileno(), 0, nbytes)
    except OSError:
        return False
