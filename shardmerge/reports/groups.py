"""Many tensors as few rows: parts of a model, and names that differ only in their numbers. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.reports.provenance import Origin

# A segment of a name that is a number: that of a layer or an expert.
_NUMBER = re.compile(r"(?<![^.:])\d+(?![^.])")
_ANY = "#"
# A model is cut into parts until there are at least so many, as long as there are at most so many.
_FEWEST, _MOST = 3, 9


@dataclass(frozen=True, slots=True)
class Pattern:
    """Tensors whose names differ only in their numbers, and which are of one type and shape and made alike.

    Attributes
    ----------
    name
        ``model.layers.{0-31}.mlp.up_proj.weight``.
    first
        The first of them.
    count, nbytes
        Of all of them.
    source
        What they are made of, with ``#`` for every number.
    """

    name: str
    first: Origin
    count: int
    nbytes: int
    source: str


def patterns(tensors: Iterable[Origin]) -> list[Pattern]:
    """Returns the patterns of tensors, in the order in which they begin."""
    found: dict[tuple[object, ...], list[Origin]] = defaultdict(list)
    for one in tensors:
        key = (_NUMBER.sub(_ANY, one.name), one.dtype, one.shape, one.how, one.rule, _sources(one), one.kind)
        found[key].append(one)
    return [_pattern(members) for members in found.values()]


def _pattern(members: Sequence[Origin]) -> Pattern:
    columns = zip(*([int(text) for text in _NUMBER.findall(one.name)] for one in members), strict=True)
    spans = [str(low) if low == high else f"{{{low}-{high}}}" for low, high in ((min(c), max(c)) for c in columns)]
    pieces = iter(spans)
    first, source = members[0], _sources(members[0])
    name = _NUMBER.sub(lambda _: next(pieces), first.name)
    return Pattern(name, first, len(members), sum(one.nbytes for one in members), source)


def _sources(tensor: Origin) -> str:
    return leaves_text([_NUMBER.sub(_ANY, leaf.text) for leaf in tensor.leaves])


def leaves_text(leaves: Sequence[str]) -> str:
    """Returns what a tensor is made of in a line: all of a few, the first of many."""
    shown = list(dict.fromkeys(leaves))
    if len(shown) <= 3:
        return ", ".join(shown)
    return f"{shown[0]} and {len(leaves) - 1} more"


def part_namer(tensors: Iterable[Origin]) -> Callable[[str], str]:
    """Returns what tells the part of a model that a tensor belongs to, of its name.

    A part is the beginning of a name. The largest is cut by one more segment as long as there are too few.
    """
    sizes: dict[tuple[str, ...], int] = defaultdict(int)
    for one in tensors:
        sizes[_segments(one.name)] += one.nbytes
    cut: set[tuple[str, ...]] = {()}
    while True:
        parts = _sums(sizes, cut)
        largest = max((part for part in parts if _inner(sizes, part)), key=parts.__getitem__, default=None)
        if len(parts) >= _FEWEST or largest is None or len(_sums(sizes, cut | {largest})) > _MOST:
            return lambda name: ".".join(_part(_segments(name), cut))
        cut.add(largest)


def _segments(name: str) -> tuple[str, ...]:
    return tuple(_ANY if part.isdigit() else part for part in name.split("."))


def _part(segments: tuple[str, ...], cut: set[tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the shortest beginning of a name that is not cut further."""
    return next((segments[:end] for end in range(1, len(segments)) if segments[:end] not in cut), segments)


def _inner(sizes: Mapping[tuple[str, ...], int], part: tuple[str, ...]) -> bool:
    return any(len(one) > len(part) and one[: len(part)] == part for one in sizes)


def _sums(sizes: Mapping[tuple[str, ...], int], cut: set[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = defaultdict(int)
    for segments, nbytes in sizes.items():
        found[_part(segments, cut)] += nbytes
    return found


def folded(sizes: Mapping[str, float], most: int, others: str) -> dict[str, str]:
    """Returns for each name the one that it is shown by: its own, or ``7 others`` for those past the largest.

    Parameters
    ----------
    sizes
        Of each name.
    most
        How many are shown.
    others
        What the rest is called.
    """
    ordered = sorted(sizes, key=lambda name: (-sizes[name], name))
    if len(ordered) <= most:
        return {name: name for name in ordered}
    rest = f"{len(ordered) - most + 1} {others}"
    return {name: name if place < most - 1 else rest for place, name in enumerate(ordered)}
