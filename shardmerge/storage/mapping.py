"""Files mapped into memory, for views that live as long as somebody uses them.

A file is mapped once, whole, and all views share the map: a thousand tensors cost one entry of the process's memory
map and not a thousand (Linux grants 65,530, ``vm.max_map_count``, and a model of a trillion parameters has more
tensors). Memory is used for touched pages only; the pages of a view leave the process with it.

A view that may be written in has its range of a private map to itself: the system copies a page when it is written
(``MAP_PRIVATE``), so the file stays as it is, and so does what others see of it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from bisect import bisect, insort
from weakref import WeakValueDictionary, finalize

from shardmerge.storage.reading import FilePool

# asm-generic/mman-common.h; Python's module names it from 3.13 on. Without it Linux refuses a map that could be written
# if it is larger than the memory (100 GB on a machine of 24: ENOMEM), since all of its pages might be copied.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().machine in ("x86_64", "aarch64") else 0)


class FileMaps:
    """Views of the files of a pool. Safe for threads.

    Parameters
    ----------
    pool
        Opens the files, and compares them with what they were when they were planned with.
    """

    def __init__(self, pool: FilePool) -> None:
        self._pool = pool
        self._maps: WeakValueDictionary[tuple[str, bool], _Map] = WeakValueDictionary()
        self._lock = threading.Lock()

    def view(self, path: str, offset: int, nbytes: int, *, writable: bool) -> memoryview | None:
        """Returns a view of a range without reading it, or None where the range can only be read.

        The system may refuse a map (a limit of the address space, a file system that has none). Of a file that is
        shorter by now nothing is mapped, since who touches what is gone is killed; who reads it gets an error.

        Parameters
        ----------
        path, offset, nbytes
            The range, in bytes; at least one.
        writable
            Whether the view may be written in. Nothing that is written reaches the file or another view.
        """
        file = self._pool.get(path)
        if offset + nbytes > min(file.size, os.fstat(file.fileno()).st_size):
            return None
        key = path, writable
        with self._lock:
            found = self._maps.get(key)
            if found is None or not found.grants(offset, nbytes):
                try:
                    found = _Map(_mapped(file.fileno(), file.size), exclusive=writable)
                except (OSError, ValueError):  # ValueError: shorter than a moment ago
                    return None
                self._maps[key] = found
            return found.view(offset, nbytes)


class _Map:
    """A mapped file. It goes with its last view.

    Parameters
    ----------
    memory
        The file, from its first byte on.
    exclusive
        Whether each range is given out once: whoever had it before may have written in it.
    """

    __slots__ = ("__weakref__", "_exclusive", "_given", "_memory")

    def __init__(self, memory: mmap.mmap, *, exclusive: bool) -> None:
        self._memory = memory
        self._exclusive = exclusive
        self._given: list[tuple[int, int]] = []  # in order, without overlaps

    def grants(self, offset: int, nbytes: int) -> bool:
        """Tells whether a view of this range may be had: always, or as long as nobody had one of its bytes."""
        at = bisect(self._given, (offset, offset))
        return all(end <= offset or offset + nbytes <= start for start, end in self._given[max(at - 1, 0) : at + 1])

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Returns a view of the range; its last user keeps the map alive.

        Users of a buffer may let go of the memoryview they were given and keep what it was made of (numpy does). So
        what is watched here is an object of ctypes between the view and the map: nobody has the one without it.
        """
        if self._exclusive:
            insort(self._given, (offset, offset + nbytes))
        part = (ctypes.c_char * nbytes).from_buffer(self._memory, offset)
        # At the end of the process the system frees all, and a tensor may still be in use by then.
        finalize(part, self._let_go, offset, nbytes).atexit = False
        found = memoryview(part).cast("B")
        return found if self._exclusive else found.toreadonly()

    def _let_go(self, offset: int, nbytes: int) -> None:
        """Takes the whole pages of a view that is gone out of memory, copied ones too: nobody else has these."""
        page = mmap.PAGESIZE
        first, end = -(-offset // page) * page, (offset + nbytes) // page * page
        if first < end:
            self._memory.madvise(mmap.MADV_DONTNEED, first, end - first)


def _mapped(fd: int, nbytes: int) -> mmap.mmap:
    """Returns the file mapped. Before Python 3.13 a map holds a descriptor of its own as long as it lives."""
    flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, nbytes, flags=flags, prot=prot, trackfd=False)
    return mmap.mmap(fd, nbytes, flags=flags, prot=prot)
