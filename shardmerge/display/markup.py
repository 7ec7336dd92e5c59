"""A card as HTML that stands alone: no script, no network, colours of the notebook it is in, or light and dark.

What opens and closes is ``<details>``. Every text is escaped: names and paths are somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from shardmerge.display.card import Card, Kind, one_line
from shardmerge.display.tree import Branch, grown
from shardmerge.plan.catalog_tree import human_count, shortened
from shardmerge.plan.name_patterns import NamePattern
from shardmerge.plan.tables import human_bytes

# Characters of each part. With 3 kB of style and what closes the parts they make less than 30 kB.
_WARNINGS, _SHARES, _FACTS, _TREE = 3_000, 3_000, 5_000, 14_000
_LONGEST = 200
_COLOURS = 6
# Open at first sight: what holds more than this part of the bytes.
_LARGE = 0.5


def markup(card: Card) -> str:
    """Returns a card as HTML."""
    return "".join((f"<style>{_style()}</style>", '<div class="sm-card">', *_parts(card), "</div>"))


def _style() -> str:
    return files("shardmerge.display").joinpath("card.css").read_text("utf-8").replace("\n", "")


def _parts(card: Card) -> Iterator[str]:
    yield f"<b>{_text(card.title)}</b>"
    yield from _within(_WARNINGS, (f'<div class="sm-w">warning: {_text(one)}</div>' for one in card.warnings))
    yield from _bar(*card.shares)
    facts = (f"<span>{_text(label)}</span><span>{_text(text)}</span>" for label, text in card.facts)
    yield f'<div class="sm-f">{"".join(_within(_FACTS, facts))}</div>'
    tensors = list(card.tensors)
    if tensors:
        colours = {label: _colour(at) for at, (label, _) in enumerate(card.shares[1])} if tensors[0][1][2] else {}
        yield f'<div class="sm-t">{"".join(_tree(grown(tensors), colours))}</div>'
    if card.items[1]:
        rows = (f'<div class="sm-r"><code>{_text(one)}</code></div>' for one in card.items[1])
        title = f"<summary>{_text(card.items[0])}</summary>"
        yield f'<div class="sm-t"><details>{title}{"".join(_within(_TREE, rows))}</details></div>'


def _bar(by: str, shares: tuple[tuple[str, int], ...]) -> Iterator[str]:
    """Yields the bytes of each share as a bar, and the key to its colours: the last one is that of all others."""
    total = sum(nbytes for _, nbytes in shares)
    if not total:
        return
    lengths = [nbytes for _, nbytes in shares]
    lengths[_COLOURS - 1 :] = [sum(lengths[_COLOURS - 1 :])]
    bars = (f'<i style="flex:{n / total:.4f};background:{_colour(at)}"></i>' for at, n in enumerate(lengths) if n)
    keys = (
        f'<span class="sm-k"><i style="background:{_colour(at)}"></i>{_text(label)} '
        f'<span class="sm-q">{human_bytes(nbytes)}, {nbytes / total:.0%}</span></span>'
        for at, (label, nbytes) in enumerate(shares)
    )
    title = f"bytes by {by}"
    yield f'<div class="sm-bar" role="img" aria-label="{title}" title="{title}">{"".join(bars)}</div>'
    yield f"<div>{''.join(_within(_SHARES, keys))}</div>"


def _colour(at: int) -> str:
    return f"var(--c{min(at, _COLOURS - 1)})"


def _tree(branches: list[Branch], colours: dict[str, str]) -> Iterator[str]:
    whole = sum(one.nbytes for one in branches)
    rows = (piece for one in branches for piece in _branch(one, colours, whole))
    yield from _within(_TREE, rows)


def _branch(branch: Branch, colours: dict[str, str], whole: int) -> Iterator[str]:
    leaves = [_pattern(branch.label, one, colours) for one in branch.patterns]
    if not branch.branches:
        yield from leaves
        return
    opened = " open" if branch.nbytes > _LARGE * whole else ""
    size = f"{branch.count:,} tensors &middot; {human_count(branch.parameters)} &middot; {human_bytes(branch.nbytes)}"
    row = f'<span class="sm-r"><code>{_text(branch.label)}</code><span class="sm-q">{size}</span></span>'
    yield f"<details{opened}><summary>{row}</summary>"
    yield from leaves
    for one in branch.branches.values():
        yield from _branch(one, colours, whole)
    yield "</details>"


def _pattern(label: str, pattern: NamePattern[Kind], colours: dict[str, str]) -> str:
    shape, dtype, origin = pattern.kind
    key = f'<span class="sm-k"><i style="background:{colours[origin]}"></i>{_text(origin)}</span>' if colours else ""
    count = f"{pattern.count:,} &times; " if pattern.count > 1 else ""
    what = f'<span class="sm-q">{key}{count}{dtype} {list(shape)}</span>'
    return f'<div class="sm-r sm-l"><code>{_text(label)}</code>{what}</div>'


def _within(room: int, rows: Iterator[str]) -> Iterator[str]:
    """Yields what there is room for, closes what is open, and counts the rest."""
    left_out = unopened = 0
    for row in rows:
        closing = row == "</details>"
        room -= 0 if closing else len(row)
        if closing and unopened:
            unopened -= 1
        elif closing or room >= 0:
            yield row
        else:
            left_out += 1
            unopened += row.startswith("<details")
    if left_out:
        yield f'<div class="sm-q">... and {left_out:,} more</div>'


def _text(text: str) -> str:
    return escape(shortened(one_line(text), _LONGEST))
