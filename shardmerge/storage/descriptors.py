"""Open files, as the numbers that the system gives them, none of which an interrupt loses.

What a signal raises (Ctrl-C: ``KeyboardInterrupt``) comes between any two steps of Python, also between ``os.open``,
which returns a number, and whatever keeps it. Then nobody knows the number any more, and a service that lives on has
the file open, and its blocks taken if it is deleted, until it ends. Inside of a call of C nothing comes between
(https://docs.python.org/3/library/signal.html#execution-of-python-signal-handlers), and so a number moves from the
system to a list, and back, in one such call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, starmap
from pathlib import Path
from types import TracebackType


class Descriptor:
    """An open file. It is closed with the last reference to it, if not before; ``with`` closes it.

    Parameters
    ----------
    numbers
        Opens it when asked for its next, in C.
    """

    __slots__ = ("_held",)

    def __init__(self, numbers: Iterator[int]) -> None:
        self._held: list[int] = []
        self._held.extend(numbers)

    def fileno(self) -> int:
        """Returns the descriptor, -1 once it is closed."""
        return self._held[0] if self._held else -1

    def moved(self) -> Descriptor:
        """Returns the first descriptor on its own, which this one does not hold any more."""
        return Descriptor(map(self._held.pop, (0,)))

    def close(self) -> None:
        """Closes it; safe to call twice. Raises the OSError of the system; it is closed all the same."""
        list(map(os.close, map(self._held.pop, [-1] * len(self._held))))

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):  # the latter where it was interrupted before it had a list
            self.close()


def opened(path: str | Path, flags: int, mode: int = 0o666) -> Descriptor:
    """Opens a file as ``os.open`` does."""
    return Descriptor(map(os.open, (path,), (flags,), (mode,)))


def pipe() -> tuple[Descriptor, Descriptor]:
    """Makes a pipe as ``os.pipe`` does: what is read from, and what is written to."""
    both = Descriptor(chain.from_iterable(starmap(os.pipe, ((),))))
    return both.moved(), both
