"""JSON of which there is one reading: no key twice, integers alone."""

from __future__ import annotations

import json
from collections import Counter


def strict_json(text: str) -> object:
    """Returns the value of a text; raises ValueError, or RecursionError where it is nested too deep."""
    return json.loads(
        text, object_pairs_hook=_without_duplicates, parse_float=_refuse_number, parse_constant=_refuse_number
    )


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _refuse_number(text: str) -> object:
    raise ValueError(f"{text} is not an integer")
