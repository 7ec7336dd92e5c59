"""Counts work instead of measuring time: a count is the same on every machine, busy or not."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType

import pytest

from shardmerge.errors import ShardmergeError


def calls(function: Callable[[], object]) -> int:
    """Returns how many functions, of Python and of C, a function calls until it returns.

    The garbage collector is off meanwhile: it runs when other tests have made enough objects, and the callbacks it
    calls were counted (hypothesis registers one).
    """
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    return count


def refusal(function: Callable[[], object]) -> tuple[ShardmergeError, int]:
    """Returns the error that a function raises, and how many functions it called until then."""
    found: list[ShardmergeError] = []

    def refused() -> None:
        with pytest.raises(ShardmergeError) as caught:
            function()
        found.append(caught.value)

    count = calls(refused)
    return found[0], count
