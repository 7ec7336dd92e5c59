"""What is to be shown of a value, whoever shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.tensors import Shape

# Shape, type, and where from; the last is empty where all come from one place.
Kind: TypeAlias = tuple[Shape, DType, str]


@dataclass(frozen=True, slots=True)
class Card:
    """A value in a few lines.

    Attributes
    ----------
    title
        What it is and how large.
    facts
        Label and text; long lists are one text.
    shares
        What the bytes are divided by, and label and bytes of each share.
    tensors
        By name.
    warnings
        To be seen before anything else.
    items
        What is no tensor and listed all the same, below a title: the rules of a preset.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    shares: tuple[str, tuple[tuple[str, int], ...]] = ("", ())
    tensors: Iterable[tuple[str, Kind]] = ()
    warnings: tuple[str, ...] = ()
    items: tuple[str, tuple[str, ...]] = ("", ())


def one_line(text: str) -> str:
    """Returns a text as it can go to a terminal: of what moves the cursor, the escape is shown."""
    return text if text.isprintable() else ascii(text)[1:-1]
