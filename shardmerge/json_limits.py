"""How much of our memory the JSON of somebody else's file may take, told from its text before it is parsed.

``{},`` is 3 bytes of text and 72 of memory, ``{"a":1},`` 8 and 240: a file of 198 MB took 4.9 GB.
"""

from __future__ import annotations

# A header names three containers a tensor, and a tensor takes more than 50 bytes of it.
_FREE_CONTAINERS, _BYTES_A_CONTAINER = 300_000, 16
_FREE_VALUES, _BYTES_A_VALUE = 4_000_000, 4
# Deeper than any config; the walks over what was read are recursive.
_DEEPEST = 64


def weighed(raw: bytes) -> bytes:
    """Returns a text of JSON that takes no more memory than a real file of its size; raises ValueError for others.

    What is counted are brackets and separators, in strings too, so the count is never too low.
    """
    containers = raw.count(b"{") + raw.count(b"[")
    if containers > max(_FREE_CONTAINERS, len(raw) // _BYTES_A_CONTAINER):
        raise ValueError(f"{containers} objects and lists are more than any such file holds")
    values = raw.count(b",") + raw.count(b":")
    if values > max(_FREE_VALUES, len(raw) // _BYTES_A_VALUE):
        raise ValueError(f"{values} values are more than any such file holds")
    return raw


def shallow(value: object) -> object:
    """Returns a value that nests no deeper than any config; raises ValueError for others."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [item for one in level if isinstance(one, dict | list) for item in _items(one)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def _items(container: dict[str, object] | list[object]) -> list[object]:
    return [*container.values()] if isinstance(container, dict) else container
