"""Two names of one file system change places in one step."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# linux/fs.h, and the kernel's own path for "the current directory".
_EXCHANGE = 2
_HERE = -100

# What a system, or a file system, without the call answers.
_NOT_HERE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})

# What rename(2) answers where the new name is taken by something that is not an empty directory.
OCCUPIED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


def exchange(first: Path, second: Path) -> bool:
    """Makes each of two paths be what the other was (``renameat2``, Linux 3.15); tells whether the system can.

    Raises
    ------
    OSError
        It can, and did not: a path is gone, or may not be renamed.
    """
    import ctypes

    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2  # glibc 2.28
    except (OSError, AttributeError):
        return False
    if call(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
