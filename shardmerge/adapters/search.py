"""Which renaming makes the modules of an adapter those of its base, by names and shapes alone. Pure.

An adapter has the names of a model in memory. On disk the same model may lack a prefix (it was saved without its head),
have one more (a wrapper, a model around it), or carry its levels in another order: transformers 4.52 moved
``language_model.model`` of vision models to ``model.language_model`` in memory and left the files as they were.

What stands before the first number of a name, or before a module's last word, is its head. All names of one head move
together, and a head moves only to one whose words are not of another part of a model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from shardmerge.adapters.fit import Fit
from shardmerge.mapping.pattern import escape
from shardmerge.mapping.renaming import Renaming, Renamings, renamed
from shardmerge.tensors import Shape

# Levels around a model that say nothing of which part of it they hold.
_LEVELS = frozenset({
    "base_model", "language_model", "model", "module", "policy", "pretrained_model", "text_model", "transformer",
    "vision_model", "_forward_module",
})  # fmt: skip
# Words of parts that are not the language model, and those of the language model.
_TOWER = re.compile(
    r"vis|vit$|image|img|audio|speech|video|sam$|siglip|clip|talker|token2wav|code2wav|perceiver|qformer"
)
_TEXT = re.compile(r"language|text|llm|thinker")
# More combinations than this are no renaming that somebody would recognise.
_MOST = 4096


class _Group(NamedTuple):
    """Names of one head; ``tails`` are what stands behind it."""

    head: str
    tails: tuple[str, ...]


def renamings(
    wanted: Mapping[str, Fit],
    optional: Iterable[str],
    base: Mapping[str, Shape],
    settled: Iterable[str],
    *,
    anywhere: bool = False,
) -> list[Renamings]:
    """Returns every renaming by which all names are tensors of the base, of fitting shapes; the plainest ones alone.

    Parameters
    ----------
    wanted
        The adapter's names that are not in the base, and what fits them.
    optional
        Those of them that may be missing: modules that the run added.
    base
        Its names and shapes.
    settled
        Names of the base that other modules of the adapter have taken.
    anywhere
        Whether a head may also become that of another part: what is proposed, not done.
    """
    index = _index(base)
    free = set(optional)
    moves: list[tuple[_Group, list[str]]] = []
    for group in _groups(wanted):
        heads = [head for head in _heads(group, index) if _all_fit(group, head, wanted, base)]
        heads = heads if anywhere else _sensible(group, heads, index)
        if heads:
            moves.append((group, heads))
        elif not free.issuperset(_joined(group.head, tail) for tail in group.tails):
            return []
    found = _combined(moves, set(settled))
    fewest = min((len(_pairs(one)) for one in found), default=0)
    kept = set(settled)
    return [_rules(one, kept) for one in found if len(_pairs(one)) == fewest]


# ---- heads and tails


def _groups(names: Iterable[str]) -> list[_Group]:
    tails: dict[str, list[str]] = defaultdict(list)
    for name in names:
        head, tail = next(_cuts(name))
        tails[head].append(tail)
    return [_Group(head, tuple(found)) for head, found in tails.items()]


def _index(base: Iterable[str]) -> dict[str, set[str]]:
    """Returns the heads by tail."""
    heads: dict[str, set[str]] = defaultdict(set)
    for name in base:
        for head, tail in _cuts(name):
            heads[tail].add(head)
    return heads


def head_of(name: str) -> str:
    """Returns what stands before the first number of a name, or before a module without one."""
    return next(_cuts(name))[0]


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yields a name in two: before each number, and before a module without a number."""
    segments = name.split(".")
    places = [place for place, text in enumerate(segments) if text.isdecimal()] or [max(len(segments) - 2, 0)]
    return ((".".join(segments[:place]), ".".join(segments[place:])) for place in places)


def _joined(head: str, tail: str) -> str:
    return f"{head}.{tail}" if head else tail


def _heads(group: _Group, index: Mapping[str, set[str]]) -> Iterator[str]:
    """Yields heads of the base that have all tails; a list of layers keeps its name."""
    numbered = group.tails[0].partition(".")[0].isdecimal()
    last = group.head.rpartition(".")[2]
    for head in sorted(set.intersection(*(index.get(tail, set()) for tail in group.tails))):
        if not numbered or not last or head.rpartition(".")[2] == last:
            yield head


def _all_fit(group: _Group, head: str, wanted: Mapping[str, Fit], base: Mapping[str, Shape]) -> bool:
    fits = ((wanted[_joined(group.head, tail)], _joined(head, tail)) for tail in group.tails)
    return all(name in base and fit(name, base[name]) for fit, name in fits)


# ---- which heads mean the same


def _may_move(old: str, new: str) -> bool:
    """No part becomes another: words that only one of two heads has say nothing of what they hold, or all are new."""
    mine, theirs = (set(one.split(".")) - _LEVELS - {""} for one in _pair(old, new))
    return (mine <= theirs or theirs <= mine) and not (_is_text(old) and _is_tower(new))


def _sensible(group: _Group, heads: list[str], index: Mapping[str, set[str]]) -> list[str]:
    """Leaves out what cannot be meant; and towers for what is called none, unless the base is all of one kind.

    Beside a head of the right kind they stay: then it is open which one is meant.
    """
    heads = [head for head in heads if _may_move(group.head, head)]
    every = {head for found in index.values() for head in found}
    kinds = {_is_tower(head) for head in every if head}
    right = [head for head in heads if _is_tower(head) == _is_tower(group.head) or len(kinds) == 1]
    return heads if right else []


def _is_tower(head: str) -> bool:
    return any(_TOWER.search(word) for word in head.split("."))


def _is_text(head: str) -> bool:
    return any(_TEXT.search(word) for word in head.split("."))


def _pair(old: str, new: str) -> tuple[str, str]:
    """Returns what differs in front: ``model.visual.blocks`` and ``visual.blocks`` are ``model`` and nothing."""
    mine, theirs = old.split("."), new.split(".")
    while mine and theirs and mine[-1] == theirs[-1]:
        mine.pop()
        theirs.pop()
    return ".".join(mine), ".".join(theirs)


# ---- all of them together

_Moves = Sequence[tuple[_Group, str]]


def _combined(moves: Sequence[tuple[_Group, list[str]]], settled: set[str]) -> list[_Moves]:
    """Returns the ways to move every group by which no two names become one."""
    count = 1
    for _, heads in moves:
        count *= len(heads)
    if not moves or count > _MOST:
        return []
    groups = [group for group, _ in moves]
    ways = (list(zip(groups, heads, strict=True)) for heads in product(*(heads for _, heads in moves)))
    return [way for way in ways if _is_one_to_one(way, settled)]


def _is_one_to_one(way: _Moves, settled: set[str]) -> bool:
    names = [_joined(head, tail) for group, head in way for tail in group.tails]
    return len(names) == len(set(names)) and settled.isdisjoint(names)


def _pairs(way: _Moves) -> set[tuple[str, str]]:
    return {_pair(group.head, head) for group, head in way}


def _rules(way: _Moves, kept: set[str]) -> Renamings:
    """Returns the rules of a way, short ones where these say the same: for a prefix, not for each head."""
    short = tuple(Renaming.of(_below(old), _below(new)) for old, new in sorted(_pairs(way)))
    if _say(short, way, kept):
        return short
    long = {}
    for group, head in way:
        for tail in group.tails:
            first = tail.split(".")[0] if not group.head or not head else ""
            long[_below(group.head, first)] = _below(head, first)
    return tuple(Renaming.of(old, new) for old, new in long.items())


def _say(rules: Renamings, way: _Moves, kept: set[str]) -> bool:
    names = {_joined(group.head, tail): _joined(head, tail) for group, head in way for tail in group.tails}
    return all(renamed(old, rules) == new for old, new in names.items()) and all(
        renamed(name, rules) == name for name in kept
    )


def _below(*words: str) -> str:
    return ".".join([*(escape(one) for one in words if one), "{rest...}"])
