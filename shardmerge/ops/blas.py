"""Matrix products made by one thread, whatever numpy's BLAS would take for itself.

numpy hands ``@`` to a BLAS, mostly OpenBLAS, which cuts a product into as many parts as there are CPUs, and whose
threads wait for each other in busy loops. The products here are small, and the engine's workers run side by side
anyway: on two cores with other work, ``[32, 512] @ [512, 512]`` in float64 ran at 6 to 11 GFLOP/s with one thread, and
at 1 to 11 with two. Where the parts are cut also decides in which order an element is summed up, and each thread of
the library keeps memory that no plan knows of.

The process may not be ours, so what is set is restored. threadpoolctl knows how each library is asked (OpenBLAS under
all its names, MKL, BLIS, FlexiBLAS) and whose threads it means. Most have one number for the process: it is the
thread's that set it first, and what others set meanwhile is ignored. So the thread that starts a run sets it for all
of the run (``execute.products``). A BLAS built with OpenMP has a number a thread: each tile sets it, which takes 14 us.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy  # noqa: F401  # brings the BLAS that is looked for

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

# What OpenBLAS keeps for each thread that calls it: packed blocks, at most GEMM_P x GEMM_Q numbers of 8 bytes. 1.1 MiB
# were measured on Haswell's kernels.
PRODUCT_BYTES = 2 << 20


def one_thread() -> AbstractContextManager[object]:
    """Lets the BLAS have one thread meanwhile."""
    limited: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limited


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    """Returns the libraries that are loaded. 6 ms and 0.8 MiB to import, 2 ms to look."""
    from threadpoolctl import ThreadpoolController  # only where products are made

    return ThreadpoolController()
