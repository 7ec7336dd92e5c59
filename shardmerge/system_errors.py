"""What to do about an error of the system, by its number: what a user can, and whether it is worth trying again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from shardmerge.errors import OutputError, ResourceError, plain

_Found = TypeVar("_Found")

# No room is left: of the disk, of a quota, or for so large a file.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

# What a network file system may say once, and no longer the next time. An error of writing is another matter: after
# EIO the data that was on its way is lost.
_PASSING = frozenset({errno.ESTALE, errno.EINTR, errno.ETIMEDOUT, errno.EAGAIN})
PASSING_WRITES = _PASSING
PASSING_READS = _PASSING | {errno.EIO}

# How long is waited before each further attempt, in seconds.
WAITS = (0.1, 0.5, 2.0)

_SPACE = "free some space or choose another output path; the same command goes on"
_LIMIT = "raise the limit of open files (ulimit -n 65536), then run the same command again"
_PERMISSION = "check the owner and the mode of the file and of the directories above it (namei -l); then run again"

_MEMORY = (
    "give less --max-memory, or --workers 1, or raise the limit of memory (ulimit -v, that of the container); "
    "then run the same command again"
)

_SERVER = "the file server does not answer; once it does, run the same command again"

_ADVICE = {
    errno.ENOENT: "the current directory was removed: change to another one, then run the same command again",
    errno.EIO: "the disk or network file system fails (dmesg may say more); once it works, run the same command again",
    errno.ESTALE: "the file server replaced or lost the file; mount it again, then run the same command again",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EMFILE: _LIMIT,
    errno.ENFILE: "all files that the system can open are in use; end other programs, then run the same command again",
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "no file may be so large here: raise the limit (ulimit -f), or give --fresh and less --shard-size",
    errno.EROFS: "mount the file system for writing, or choose an output path on another one; then run again",
    errno.ENAMETOOLONG: "choose shorter names; that of an output directory may have 230 bytes",
    errno.ELOOP: "symbolic links lead in a circle here; remove one of them, then run the same command again",
    errno.ENOMEM: _MEMORY,
    **dict.fromkeys((errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH), _SERVER),
    **dict.fromkeys((errno.ENODEV, errno.ENXIO), "the device is gone; once it is back, run the same command again"),
}


def advice(error: OSError) -> str:
    """Returns what a user can do about an error of the system."""
    # A call that names no path and finds nothing asked for the current directory.
    named = error.errno == errno.ENOENT and error.filename is not None
    return _ADVICE.get(0 if named else error.errno or 0, "run the same command again")


@contextmanager
def about(path: str | Path) -> Iterator[None]:
    """Adds the file to an error of the system that does not name one: that of a read from an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def no_memory() -> ResourceError:
    """Returns the error of a process that got no more memory."""
    return ResourceError("no-memory", "the system gives no more memory", hint=_MEMORY)


def not_started(what: str, error: Exception) -> ResourceError:
    """Returns the error of a thread or a process that the system did not start."""
    hint = "give --workers 1, or raise the limits (ulimit -u and -v, pids and memory of the container); then run again"
    return ResourceError("not-started", f"the system does not start another {what}", found=str(error), hint=hint)


def read_small(path: Path) -> bytes:
    """Returns a file of ours; an error that may pass is tried again.

    Raises
    ------
    OSError
        With the file's name, which those of reading and closing have not.
    """
    with about(path):
        return tried_again(path.read_bytes, PASSING_READS)


def tried_again(work: Callable[[], _Found], passing: frozenset[int]) -> _Found:
    """Returns what work returns. It is tried again after an error that may pass, a bounded number of times.

    Parameters
    ----------
    work
        Leaves nothing behind when it fails, or goes on where it was.
    passing
        Numbers of errors. An ``OutputError`` counts if an error of the system is its cause.
    """
    for wait in WAITS:
        try:
            return work()
        except Exception as error:  # raised again, unless the system is its cause
            cause = error.__cause__ if isinstance(error, OutputError) else error  # what was read had its attempts
            if not isinstance(cause, OSError) or cause.errno not in passing:
                raise
            tell(cause, wait)
            time.sleep(wait)
    return work()


def tell(error: OSError, wait: float) -> None:
    """Notes in the log ``shardmerge`` that something is tried again, in so many seconds."""
    import logging  # noqa: PLC0415  # for an accident alone

    where = f" ({plain(str(error.filename))})" if error.filename else ""
    logging.getLogger("shardmerge").warning("%s%s: trying again in %g s", error.strerror, where, wait)
