"""Reading files by byte range: pread, or short-lived windows of a memory map.

Mapping saves a copy and costs page faults, and all threads of a process fault in one address space. The bare loop of a
cast took 0.9 to 1 times the CPU time with windows, and no time on the wall that stands out (decision 27). So windows
are for who asks for them.

A mapping of a truncated file kills the process (SIGBUS) when touched, so a window is populated first with
``MADV_POPULATE_READ``, which reports the same accident as an error (measured on Linux 6.18: EFAULT). Where the kernel
or the file system cannot do that, or reports an error, and for short reads, ``pread`` is used.
"""

from __future__ import annotations

import mmap
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

from shardmerge.errors import CheckpointError, UnreadableError
from shardmerge.storage.cache import Trail, drop_read
from shardmerge.storage.descriptors import Descriptor, opened
from shardmerge.storage.listing import without_links
from shardmerge.system_errors import PASSING_READS, advice, tell, tried_again

IoMode: TypeAlias = Literal["pread", "mmap"]

# Linux 5.14, include/uapi/asm-generic/mman-common.h; Python's mmap module has no name for it.
_MADV_POPULATE_READ = 22

_FLAGS = os.O_RDONLY | os.O_NONBLOCK  # the latter for a FIFO, of which an open would wait

# Below this a window costs more (mmap, madvise, munmap, page faults) than the copy it saves. Casts of fp32 to bf16 from
# windows and from a buffer used again, us of CPU time: 100 and 70 for 128 KiB, 165 and 120 for 256 KiB, 265 and 225 for
# 512 KiB, 470 and 450 for 1 MiB, 1020 and 1030 for 2 MiB.
_SMALLEST_WINDOW = 1 << 20

# What a pool leaves of the descriptors that a process may have: the output's, libraries', the caller's own.
_SPARED_FILES = 128

# Model and optimizer files of 4,096 ranks; a descriptor costs the kernel a few hundred bytes.
_WANTED_FILES = 8192 + _SPARED_FILES


class SourceFile:
    """A file open for reading, pinned by the size it had when it was opened.

    Attributes
    ----------
    path, size
        As it was opened; the size in bytes.
    status
        From ``fstat``.

    Raises
    ------
    UnreadableError
        ``missing-file``: no such file. ``unreadable-file``: the system refused.
    CheckpointError
        ``not-a-file``: a directory, device, socket or FIFO. ``source-changed``: leaving it with an error, for which
        the file may not be to blame, since it was written to, replaced or removed meanwhile.
    """

    _fd = -1  # of one that is closed, and of what is only read like a file

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._opened = _open(self.path)
        self._fd = self._opened.fileno()
        status = self._looked_at()
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError("not-a-file", "only regular files can be read", where=self.path)
        self.status = status
        self.size = status.st_size

    def _looked_at(self) -> os.stat_result:
        try:
            return tried_again(lambda: os.fstat(self._fd), PASSING_READS)
        except OSError as error:
            self.close()
            what = f"cannot open: {error.strerror}"
            raise UnreadableError("unreadable-file", what, where=self.path, hint=advice(error)) from error

    def read(self, offset: int, nbytes: int) -> bytes:
        """Returns exactly ``nbytes`` bytes from ``offset`` on, or raises ``truncated-file``."""
        buffer = bytearray(self._checked(offset, nbytes))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fills ``out`` from ``offset`` on. After a short read it begins again once, then goes on from its count.

        Raises
        ------
        CheckpointError
            ``truncated-file``: the file ends first. ``unreadable-file``: an I/O error, with the byte.
        """
        if self._read_some(offset, out) == len(out):
            return
        done = self._read_some(offset, out)
        while done < len(out):
            got = self._read_some(offset + done, out[done:])
            if got == 0:
                raise self._truncated(offset, len(out))
            done += got

    def _read_some(self, offset: int, out: memoryview) -> int:
        try:
            return os.preadv(self._fd, [out], offset)
        except OSError as error:
            return self._read_again(offset, out, error)

    def _read_again(self, offset: int, out: memoryview, error: OSError) -> int:
        """Reads after an error that may pass; raises ``unreadable-file`` once it does not."""
        if error.errno not in PASSING_READS:
            raise self._broken(offset, error) from error
        tell(error, 0.0)

        def read() -> int:
            self._reopen()
            return os.preadv(self._fd, [out], offset)

        try:
            return tried_again(read, PASSING_READS)
        except OSError as last:
            raise self._broken(offset, last) from last

    def _reopen(self) -> None:
        """Opens the path again if it is still the same file: a stale handle of a network file system stays stale."""
        with opened(self.path, _FLAGS) as again:
            if _identity(os.fstat(again.fileno())) == _identity(self.status):
                os.dup2(again.fileno(), self._fd, inheritable=False)

    def read_runs(self, offsets: Sequence[int], outs: Sequence[memoryview]) -> None:
        """Fills each buffer from its offset on, as ``read_into`` does; a short loop, since there may be thousands."""
        fd, read = self._fd, os.preadv
        for offset, out in zip(offsets, outs, strict=True):
            try:
                whole = read(fd, (out,), offset) == len(out)
            except OSError as error:
                whole = self._read_again(offset, out, error) == len(out)
            if not whole:
                self.read_into(offset, out)

    def expect(self, offset: int, nbytes: int) -> None:
        """Starts reading a range into the page cache, where the system does such things."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a hint
                os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def window(self, offset: int, nbytes: int) -> memoryview:
        """Returns a read-only view of the bytes, mapped; the mapping goes when the last view of it goes.

        The pages are read before the view is returned, so a file that shrank is an error and not a signal. Where
        something is in the way (a kernel before 5.14, a file system, a limit of address space, a disk that fails), the
        bytes are read; an error that is not of the mapping alone comes again there, and may pass.

        Raises
        ------
        CheckpointError
            As ``read_into``.
        """
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        length = offset + nbytes - start
        try:
            mapping = mmap.mmap(self._fd, length, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=start)
            mapping.madvise(_MADV_POPULATE_READ)
        except (OSError, ValueError):  # the latter where the file is shorter by now: Python compares
            return memoryview(self.read(offset, nbytes))  # never touch an unchecked page
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
            self._fd = -1
            with suppress(OSError):  # of a file that was only read, nothing is lost
                self._opened.close()

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        changed = self._changed() if isinstance(error, Exception) else ""
        self.close()
        if changed:
            raise CheckpointError(
                "source-changed",
                "a file changed while it was being read",
                where=self.path,
                found=changed,
                expected=f"{self.size} bytes, as when it was opened",
                hint="wait until whoever writes it is done, then run again",
            ) from error

    def _changed(self) -> str:
        """Returns what the file is by now, where it is not what was opened."""
        with suppress(OSError):
            now, then = os.fstat(self._fd), self.status
            # The size too: two changes within a tick of the kernel's clock (1 to 10 ms) have one time.
            if (now.st_size, now.st_ctime_ns) != (then.st_size, then.st_ctime_ns):
                return f"{now.st_size} bytes, written to, replaced or removed meanwhile"
        return ""

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

    def _broken(self, offset: int, error: OSError) -> UnreadableError:
        return UnreadableError(
            "unreadable-file",
            f"the system could not read: {error.strerror}",
            where=f"{self.path}, byte {offset}",
            hint=advice(error),
        )


def read_whole(path: str | Path) -> bytes:
    """Returns all bytes of a small file; an error that may pass is tried again.

    Raises
    ------
    CheckpointError
        As ``SourceFile`` and its ``read_into``.
    """
    with SourceFile(path) as file:
        return file.read(0, file.size)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open(path: str) -> Descriptor:
    try:
        return tried_again(lambda: opened(path, _FLAGS), PASSING_READS)
    except FileNotFoundError as error:
        hint = "it was listed, or named by another file: wait until whoever writes there is done, then run again"
        raise UnreadableError("missing-file", "no such file", where=path, hint=hint) from error
    except OSError as error:
        what = f"cannot open: {error.strerror}"
        raise UnreadableError("unreadable-file", what, where=path, hint=advice(error)) from error


class FilePool:
    """Files held open for many reads, least recently used closed first. Safe for threads.

    Parameters
    ----------
    io
        How files are read.
    bounded
        Whether pages leave the page cache soon after they were read.
    sharers
        How many pools share the descriptors that the process may have.
    open_file
        What opens a file by its path; of sources ``packed.source_opener``, for frames inside files.

    Attributes
    ----------
    bounded
        As given.
    bytes_read, reads, opens
        What has been read through the pool so far, in bytes and calls, and how often a file was opened for it.
    opened
        Called with every file that is opened, before it is read; what it raises goes to whoever asked for the bytes.
    seen
        Called with path, offset and bytes of what was read, by whichever thread. What it raises goes the same way.
    skimmed
        Called with path, first offset and number of bytes of what ``read_runs`` read.
    """

    def __init__(
        self,
        io: IoMode = "pread",
        *,
        bounded: bool = False,
        sharers: int = 1,
        open_file: Callable[[str], SourceFile] = SourceFile,
    ) -> None:
        self._open_file = open_file
        self.bytes_read = 0
        self.reads = 0
        self.opens = 0
        self._most = max(most_open_files() // sharers, 16)
        self._io = io
        self.bounded = bounded
        self.opened: Callable[[SourceFile], None] | None = None
        self.seen: Callable[[str, int, memoryview], None] | None = None
        self.skimmed: Callable[[str, int, int], None] | None = None
        self._trail = Trail() if bounded else None
        self._open: OrderedDict[str, SourceFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> SourceFile:
        """Returns the open file. An evicted file closes when its last user lets go of it."""
        return self._get(path, 0, 0)

    def _get(self, path: str, nbytes: int, reads: int) -> SourceFile:
        """Returns the open file and counts what is about to be read of it, under one lock: 1,024 ranks ask often."""
        with self._lock:
            self.bytes_read += nbytes
            self.reads += reads
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                return file
            file = self._open_file(path)
            if self.opened is not None:
                try:
                    self.opened(file)
                except BaseException:
                    file.close()
                    raise
            self._open[path] = file
            self.opens += 1
            if len(self._open) > self._most:
                self._open.popitem(last=False)
            return file

    def close(self) -> None:
        """Closes all files; what is asked for afterwards opens its file anew."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def view(self, path: str, offset: int, nbytes: int) -> memoryview:
        """Returns the bytes, mapped or read into fresh memory."""
        mapped = self.window(path, offset, nbytes)
        if mapped is not None:
            return mapped
        buffer = memoryview(bytearray(nbytes))
        self.read_into(path, offset, buffer)
        return buffer

    def window(self, path: str, offset: int, nbytes: int) -> memoryview | None:
        """Returns the bytes mapped, or None where nobody asked for that or it does not pay."""
        if nbytes < _SMALLEST_WINDOW or self._io != "mmap":
            return None
        file = self._get(path, nbytes, 1)
        self._passed(file, offset, nbytes)
        found = file.window(offset, nbytes)
        if self.seen is not None:
            self.seen(path, offset, found)
        return found

    def read_into(self, path: str, offset: int, out: memoryview) -> None:
        """Fills ``out`` from the file's byte ``offset`` on."""
        file = self._get(path, len(out), 1)
        self._passed(file, offset, len(out))
        file.read_into(offset, out)
        if self.seen is not None:
            self.seen(path, offset, out)

    def read_runs(self, path: str, offsets: Sequence[int], outs: Sequence[memoryview]) -> None:
        """Fills each buffer from its offset in the file on: many short reads for the price of their system calls.

        The pages stay in the page cache, since the other bands of a matrix are in the same ones.
        """
        nbytes = sum(map(len, outs))
        self._get(path, nbytes, len(outs)).read_runs(offsets, outs)
        if self.skimmed is not None:
            self.skimmed(path, offsets[0], nbytes)

    def expect(self, path: str, offset: int, nbytes: int) -> None:
        """Lets the system read these bytes ahead; it cannot guess that short reads apart from each other go on."""
        self.get(path).expect(offset, nbytes)

    def _passed(self, file: SourceFile, offset: int, nbytes: int) -> None:
        if self._trail is not None:
            self._trail.passed(nbytes, partial(file.drop, offset, nbytes))


def most_open_files() -> int:
    """Returns how many files a pool may hold open, and raises the soft limit of the process to the hard one for it.

    A tensor of a ZeRO-3 run lies in a file of each of its ranks: with fewer descriptors than ranks every tensor opens
    all of them anew (measured with 256 for 1,024 ranks: 1,024 opens a tensor, now 1,024 in all). The usual soft limit
    of 1,024 is kept low for the sake of ``select``; nothing here selects.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):  # a sandbox that forbids it
            pass
    return max(wanted if soft == resource.RLIM_INFINITY else min(soft, wanted) - _SPARED_FILES, 16)


def file_system(path: str | Path) -> str:
    """Returns the type of the file system that holds ``path`` (``ext4``, ``nfs4``, ...), or ``""`` if unknown.

    By mount point: the device number of a btrfs subvolume is not that of its mount.
    """
    try:
        place = without_links(Path(path))
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    found = {}
    for line in lines:  # proc(5): ... major:minor root mountpoint options ... - type source options
        fields = line.split()
        found[fields[4].replace("\\040", " ")] = fields[fields.index("-") + 1]  # a later mount hides an earlier one
    return next((found[str(folder)] for folder in (place, *place.parents) if str(folder) in found), "")
