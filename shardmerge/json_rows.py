"""JSON that is written as it is made: a plan of 91,000 tensors is 100 MB of text, and ten times that in objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

# Schema of every --json answer, errors included.
JSON_SCHEMA = 1

Encode: TypeAlias = Callable[[object], str]


@dataclass(frozen=True, slots=True)
class Rows:
    """A JSON array whose elements are made when they are written.

    Attributes
    ----------
    make
        Yields the elements; called once each time the array is written.
    """

    make: Callable[[], Iterator[object]]


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object that holds rows, at any depth; any other value is encoded whole."""

    values: Mapping[str, object]


def canonical_text(value: object) -> Iterator[str]:
    """Yields the text of a value in pieces, as ``json.dumps`` with sorted keys and without blanks writes it."""
    encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    return _pieces(value, encode, sort=True, end="", colon=":")


def lines(value: object) -> Iterator[str]:
    """Yields the text of a value in pieces, each row on a line of its own."""
    return _pieces(value, json.JSONEncoder().encode, sort=False, end="\n", colon=": ")


def _pieces(value: object, encode: Encode, *, sort: bool, end: str, colon: str) -> Iterator[str]:
    if isinstance(value, Rows):
        before = "["
        for row in value.make():
            yield before + end
            yield from _pieces(row, encode, sort=sort, end=end, colon=colon)
            before = ","
        yield "]" if before == "," else "[]"
    elif isinstance(value, Fields):
        before = "{"
        for key, field in sorted(value.values.items()) if sort else value.values.items():
            yield f"{before}{end}{encode(key)}{colon}"
            yield from _pieces(field, encode, sort=sort, end=end, colon=colon)
            before = ","
        yield end + "}"
    else:
        yield encode(value)
