"""What an executor is: parts go in, and when it returns each has a receipt.

An executor decides who makes which part and when. That a part is whole, and counts once, is no business of its: a part
is committed by its receipt (``publish.making``), made twice it is the same, and made by nobody it is missed by whoever
finishes. So nothing here has to be right for a result to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from shardmerge.execute.engine import Counters
from shardmerge.plan.schedule import Schedule
from shardmerge.plan.value import Part

# Called several times a second with the bytes done since the last call, 0 too, from the thread that waits.
Progress: TypeAlias = Callable[[int], None]

# Asked now and then; once it says yes, what is under way is given up.
Stopped: TypeAlias = Callable[[], bool]


class Make(Protocol):
    """Makes and commits a part."""

    def __call__(self, part: Part, counters: Counters, stopped: Stopped) -> None:
        """Returns when the part has a receipt.

        Parameters
        ----------
        part
            What to make.
        counters
            One number a thread, counted up by bytes.
        stopped
            Asked while it is made.
        """


class Executor(Protocol):
    """Has parts made."""

    def __call__(self, parts: Sequence[Part], make: Make, how: Schedule, progress: Progress | None) -> None:
        """Returns when all parts have receipts, those begun first that are largest.

        Raises
        ------
        ShardmergeError
            What making a part raises; parts that were done by then stay.
        InterruptedRunError
            ``interrupted``.
        """
