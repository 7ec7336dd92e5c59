"""Reading files by byte range: pread, and short-lived windows of a memory map.

A mapping of a truncated file kills the process (SIGBUS) when touched, so a window is populated first with
``MADV_POPULATE_READ``, which reports the same accident as an error (measured on Linux 6.18: EFAULT). Where the kernel
or the file system cannot do that, and for short reads, ``pread`` is used.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

from shardmerge.errors import CheckpointError, UsageError
from shardmerge.storage.cache import Trail, drop_read

IoMode: TypeAlias = Literal["auto", "mmap", "pread"]

# Linux 5.14, include/uapi/asm-generic/mman-common.h; Python's mmap module has no name for it.
_MADV_POPULATE_READ = 22

# Below this a window costs more system calls (mmap, madvise, munmap) than the copy it saves.
_SMALLEST_WINDOW = 1 << 20

# A pool never holds more descriptors than this: 1,024 is the usual soft limit, and a ZeRO-3 run has 2 files a rank.
_MOST_OPEN_FILES = 256

# /proc/self/mountinfo types whose mappings are coherent and cheap; every other file system is read with pread.
_LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "zfs", "f2fs", "overlay"})


class SourceFile:
    """A file open for reading, pinned by the size it had when it was opened.

    Raises
    ------
    UsageError
        ``missing-file``: no such file.
    CheckpointError
        ``not-a-file``: a directory, device, socket or FIFO. ``unreadable-file``: the system refused.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._fd = _open(self.path)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError("not-a-file", "only regular files can be read", where=self.path)
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns

    def read(self, offset: int, nbytes: int) -> bytes:
        """Returns exactly ``nbytes`` bytes from ``offset`` on, or raises ``truncated-file``."""
        buffer = bytearray(self._checked(offset, nbytes))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fills ``out`` from ``offset`` on, looping over short reads.

        Raises
        ------
        CheckpointError
            ``truncated-file``: the file ends first. ``unreadable-file``: an I/O error, with the byte.
        """
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                raise self._broken(offset + done, error) from error
            if got == 0:
                raise self._truncated(offset, len(out))
            done += got

    def window(self, offset: int, nbytes: int) -> memoryview:
        """Returns a read-only view of the bytes, mapped; the mapping goes when the last view of it goes.

        The pages are read before the view is returned, so a file that shrank is an error and not a signal.
        """
        self._checked(offset, nbytes)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        length = offset + nbytes - start
        try:
            mapping = mmap.mmap(self._fd, length, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=start)
        except ValueError as error:  # Python compares the length with the file's size right now
            raise self._truncated(offset, nbytes) from error
        try:
            mapping.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise self._truncated(offset, nbytes) from error
            if error.errno != errno.EINVAL:
                raise self._broken(offset, error) from error
            return memoryview(self.read(offset, nbytes))  # a kernel before 5.14: never touch an unchecked page
        return memoryview(mapping)[offset - start : length]

    def drop(self, offset: int, nbytes: int) -> None:
        """Lets the pages of a range leave the page cache."""
        if self._fd >= 0:
            drop_read(self._fd, offset, nbytes)

    def fileno(self) -> int:
        """Returns the descriptor, as long as the file is open."""
        return self._fd

    def close(self) -> None:
        """Closes the descriptor; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _checked(self, offset: int, nbytes: int) -> int:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise self._truncated(offset, nbytes)
        return nbytes

    def _truncated(self, offset: int, nbytes: int) -> CheckpointError:
        return CheckpointError(
            "truncated-file",
            "the file ends before the data that its header announces",
            where=f"{self.path}, byte {offset}",
            found=f"{self.size} bytes",
            expected=f"at least {offset + nbytes} bytes",
            hint="copy or download the file again; a checkpoint still being written looks like this too",
        )

    def _broken(self, offset: int, error: OSError) -> CheckpointError:
        return CheckpointError(
            "unreadable-file",
            f"the system could not read: {error.strerror}",
            where=f"{self.path}, byte {offset}",
        )


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise UsageError("missing-file", "no such file", where=path) from error
    except OSError as error:
        raise CheckpointError("unreadable-file", f"cannot open: {error.strerror}", where=path) from error


class FilePool:
    """Files held open for many reads, least recently used closed first. Safe for threads.

    Parameters
    ----------
    io
        How files are read.
    bounded
        Whether pages leave the page cache soon after they were read.

    Attributes
    ----------
    bytes_read, reads
        What has been read through the pool so far, in bytes and calls.
    """

    def __init__(self, io: IoMode = "auto", *, bounded: bool = False) -> None:
        self.bytes_read = 0
        self.reads = 0
        self._io = io
        self._trail = Trail() if bounded else None
        self._open: OrderedDict[str, SourceFile] = OrderedDict()
        self._maps: dict[str, bool] = {}
        self._lock = threading.Lock()

    def get(self, path: str) -> SourceFile:
        """Returns the open file. An evicted file closes when its last user lets go of it."""
        with self._lock:
            file = self._open.pop(path, None) or SourceFile(path)
            self._open[path] = file
            if len(self._open) > _MOST_OPEN_FILES:
                self._open.popitem(last=False)
            return file

    def view(self, path: str, offset: int, nbytes: int) -> memoryview:
        """Returns the bytes, mapped where that is safe and pays, else read into fresh memory."""
        mapped = self.window(path, offset, nbytes)
        if mapped is not None:
            return mapped
        buffer = memoryview(bytearray(nbytes))
        self.read_into(path, offset, buffer)
        return buffer

    def window(self, path: str, offset: int, nbytes: int) -> memoryview | None:
        """Returns the bytes mapped, or None where that is not safe or does not pay."""
        if nbytes < _SMALLEST_WINDOW or not self._mapped(path):
            return None
        file = self.get(path)
        self._passed(file, offset, nbytes)
        return file.window(offset, nbytes)

    def read_into(self, path: str, offset: int, out: memoryview) -> None:
        """Fills ``out`` from the file's byte ``offset`` on."""
        file = self.get(path)
        self._passed(file, offset, len(out))
        file.read_into(offset, out)

    def _passed(self, file: SourceFile, offset: int, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes
            self.reads += 1
        if self._trail is not None:
            self._trail.passed(nbytes, partial(file.drop, offset, nbytes))

    def _mapped(self, path: str) -> bool:
        if self._io != "auto":
            return self._io == "mmap"
        if path not in self._maps:
            self._maps[path] = file_system(path) in _LOCAL_FILE_SYSTEMS
        return self._maps[path]


def file_system(path: str | Path) -> str:
    """Returns the type of the file system that holds ``path`` (``ext4``, ``nfs4``, ...), or ``""`` if unknown."""
    try:
        device = Path(path).stat().st_dev
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:  # proc(5): ... major:minor root mountpoint options ... - type source options
        fields = line.split()
        if fields[2] == name:
            return fields[fields.index("-") + 1]
    return ""
