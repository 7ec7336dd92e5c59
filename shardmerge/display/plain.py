"""A card as plain text of at most ten lines."""

from __future__ import annotations

from collections.abc import Iterator

from shardmerge.display.card import Card, one_line
from shardmerge.display.tree import Branch, grown, unfolded
from shardmerge.plan.catalog_tree import human_count, shortened
from shardmerge.plan.tables import human_bytes

_MOST_LINES, _WIDTH = 10, 100
# Shares of the bytes that are named; a warning and a component each are worth more than a fourth.
_MOST_SHARES, _MOST_WARNINGS, _MOST_BRANCHES = 3, 2, 5


def plain(card: Card) -> str:
    """Returns a card as text: title, warnings, where the bytes are from, components, facts."""
    lines = [_cut(card.title), *(f"  {_cut(line)}" for line in _lines(card))]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [f"  ... {len(lines) - _MOST_LINES + 1} more lines: a notebook shows them"]
    return "\n".join(lines)


def _lines(card: Card) -> Iterator[str]:
    yield from (f"warning: {text}" for text in card.warnings[:_MOST_WARNINGS])
    if len(card.warnings) > _MOST_WARNINGS:
        yield f"... {len(card.warnings) - _MOST_WARNINGS} more warnings"
    by, shares = card.shares
    if shares:
        named = [f"{human_bytes(nbytes)} {label}" for label, nbytes in shares[:_MOST_SHARES]]
        more = f", {len(shares) - _MOST_SHARES} more" if len(shares) > _MOST_SHARES else ""
        yield f"by {by}: {', '.join(named)}{more}"
    yield from map(_branch, unfolded(grown(card.tensors), _MOST_BRANCHES))
    yield from (f"{label}: {text}" for label, text in card.facts)
    if card.items[1]:
        yield card.items[0]


def _branch(branch: Branch) -> str:
    count = f"{branch.count:,} tensor{'' if branch.count == 1 else 's'}"
    return f"{branch.label}  {count}, {human_count(branch.parameters)}, {human_bytes(branch.nbytes)}"


def _cut(text: str) -> str:
    return shortened(one_line(text), _WIDTH)
