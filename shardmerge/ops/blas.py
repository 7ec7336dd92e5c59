"""Matrix products made by one thread, whatever numpy's BLAS would take for itself.

numpy hands ``@`` to a BLAS, mostly OpenBLAS, which cuts a product into as many parts as there are CPUs, and whose
threads wait for each other in busy loops. The products here are small, and the engine's workers run side by side
anyway: on two cores with other work, ``[32, 512] @ [512, 512]`` in float64 ran at 6 to 11 GFLOP/s with one thread, and
at 1 to 11 with two. Where the parts are cut also decides in which order an element is summed up, and each thread of
the library keeps memory that no plan knows of.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.linalg import _umath_linalg  # numpy's library that is linked to its BLAS

from shardmerge.ops.arrays import Array

# What OpenBLAS keeps for each thread that calls it: packed blocks, at most GEMM_P x GEMM_Q numbers of 8 bytes. 1.1 MiB
# were measured on Haswell's kernels.
PRODUCT_BYTES = 2 << 20

# How OpenBLAS calls them: in numpy's wheels, with 64-bit integers, and as distributions ship it.
_NAMES = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")


@dataclass(slots=True)
class _Threads:
    """The library's number of threads, and how many callers want it to be one."""

    get: Callable[[], int]
    set: Callable[[int], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    before: int = 1

    def enter(self) -> None:
        """The first caller sets one thread."""
        with self.lock:
            if not self.inside:
                self.before = self.get()
                self.set(1)
            self.inside += 1

    def leave(self) -> None:
        """The last caller sets what was there before: the process may not be ours."""
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.set(self.before)


def multiply(left: Array, right: Array, out: Array) -> None:
    """Fills ``out`` with ``left @ right``, made by one thread. Allocates ``PRODUCT_BYTES`` once a calling thread."""
    with _one_thread():
        np.matmul(left, right, out=out)


@contextmanager
def _one_thread() -> Iterator[None]:
    if _LIBRARY is None:
        yield
        return
    _LIBRARY.enter()
    try:
        yield
    finally:
        _LIBRARY.leave()


def _library() -> _Threads | None:
    """Returns OpenBLAS, found among what numpy is linked to; None where numpy has another BLAS."""
    try:
        library = ctypes.CDLL(_umath_linalg.__file__)
    except OSError:
        return None
    for name in _NAMES:
        get = getattr(library, name.format("get_num_threads"), None)
        put = getattr(library, name.format("set_num_threads"), None)
        if get is not None and put is not None:
            return _Threads(get, put)
    return None


_LIBRARY = _library()
