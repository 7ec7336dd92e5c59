"""The page cache: writing starts behind the cursor, and what will not be used again may leave.

Without this a large result gathers as dirty pages until the final sync, which then waits for all of it; and in a memory
cgroup the pages of the files count, read or written (cgroup v1 does not even slow down a writer that fills it).
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import TypeAlias

# linux/fs.h: SYNC_FILE_RANGE_WRITE starts writing, the other two wait for what was started before and for this.
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4

# How far behind the cursor pages are dropped, in bytes: by then most of what was written has reached the disk.
_LAG = 16 << 20

# A page that is mapped or being written when its turn comes stays, and so does a folio (up to 2 MiB) that a range cuts:
# every drop begins so many bytes before its range.
_AGAIN = 64 << 20

_SyncFileRange: TypeAlias = Callable[[int, int, int, int], int]


# What a system or a file system that has no such call answers; EPERM comes from filters of system calls in containers.
# Nothing was waited for, so no error was taken from the descriptor.
_NOT_HERE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP, errno.EPERM})


def start_writing(fd: int, offset: int, nbytes: int) -> None:
    """Asks the system to begin writing a range's dirty pages to the disk; does not wait.

    Raises
    ------
    OSError
        The pages could not be handed to the disk. A file system may report that here and nowhere else.
    """
    _sync_range(fd, offset, nbytes, _WRITE)


def drop_written(fd: int, offset: int, nbytes: int) -> None:
    """Waits until a range is on the disk, and lets its pages go.

    Raises
    ------
    OSError
        Something of the file could not be written. Linux reports an error of writing once for each open file
        (``file_check_and_advance_wb_err``), and waiting here counts: the next ``fsync`` knows nothing of it any more.
    """
    _sync_range(fd, offset, nbytes, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
    drop_read(fd, offset, nbytes)


def drop_read(fd: int, offset: int, nbytes: int) -> None:
    """Lets the clean pages of a range go; whole pages only, those at the edges may be wanted by a neighbour.

    A hint, and one that reports no error of writing: what the system says to it does not matter.
    """
    if hasattr(os, "posix_fadvise"):
        start = max(offset - _AGAIN, 0)
        with suppress(OSError):
            os.posix_fadvise(fd, start, offset + nbytes - start, os.POSIX_FADV_DONTNEED)


class Trail:
    """Ranges that were used a while ago: each is dropped once enough others have come after it. Safe for threads."""

    def __init__(self) -> None:
        self._ranges: deque[tuple[int, Callable[[], None]]] = deque()
        self._nbytes = 0

    def passed(self, nbytes: int, drop: Callable[[], None]) -> None:
        """Notes a range just used; calls the ``drop`` of those that lie far enough behind, and raises what they do."""
        self._ranges.append((nbytes, drop))
        self._nbytes += nbytes
        while self._nbytes > _LAG:
            try:
                size, call = self._ranges.popleft()
            except IndexError:  # another thread was faster
                return
            self._nbytes -= size
            call()

    def clear(self) -> None:
        """Drops all that is left, and raises what the first that fails does."""
        while self._ranges:
            self._ranges.popleft()[1]()
        self._nbytes = 0


def _sync_range(fd: int, offset: int, nbytes: int, flags: int) -> None:
    call = _sync_file_range()
    if call is None or call(fd, offset, nbytes, flags) == 0:
        return
    import ctypes

    code = ctypes.get_errno()
    if code not in _NOT_HERE:
        raise OSError(code, os.strerror(code))


@lru_cache(maxsize=1)
def _sync_file_range() -> _SyncFileRange | None:
    """Returns the C library's function, or None where it has none (macOS). Python's os module does not offer it."""
    import ctypes  # only a run moves pages: `inspect` reads headers

    try:
        found = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    found.restype = ctypes.c_int
    call: _SyncFileRange = found
    return call
