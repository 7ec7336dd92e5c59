"""A progress bar in bytes, with GB/s, the time left, and the resident memory beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, *, quiet: bool, label: str) -> Iterator[Callable[[int], None] | None]:
    """Yields the function to call with bytes done, or None where nobody watches: ``quiet``, or not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    from shardmerge.api import resident_bytes

    with tqdm(total=total, unit="B", unit_scale=True, desc=label, file=sys.stderr, mininterval=0.2) as bar:

        def advance(nbytes: int) -> None:
            if bar.update(nbytes):  # only when it redraws: /proc is not free
                bar.set_postfix_str(f"{resident_bytes() / 2**20:.0f} MiB resident", refresh=False)

        yield advance
        bar.set_postfix_str(f"{resident_bytes() / 2**20:.0f} MiB resident")
