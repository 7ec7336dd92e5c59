"""What an interpreter and a notebook show of a value. Imported when something is shown: see ``shown.Displayed``."""

from __future__ import annotations

from shardmerge.display.cards import card
from shardmerge.display.markup import markup
from shardmerge.display.plain import plain

__all__ = ["html", "text"]


def text(value: object) -> str:
    """Returns a value in at most ten lines."""
    return plain(card(value))


def html(value: object) -> str:
    """Returns a value as HTML that stands alone, below 30 kB, whatever names it holds."""
    return markup(card(value))
