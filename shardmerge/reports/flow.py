"""The picture of the flow: how many bytes come from which source, by which operation, to which part of the model.

A Sankey diagram as SVG: three columns, each as high as all bytes together. A band goes from a source through an
operation to a part, and keeps the colour of its source. It is drawn for a width in pixels, so that its text has one
size on a desk and on a phone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.plan.tables import human_bytes
from shardmerge.reports.groups import folded, part_namer
from shardmerge.reports.markup import escaped
from shardmerge.reports.provenance import Origin

# Bytes from a source, by an operation, to a part; by these three.
Streams = Mapping[tuple[str, str, str], float]

_MOST = (8, 7, 9)
_OTHERS = ("other sources", "other operations", "other parts")
NO_SOURCE = "(no source)"

_BAR = 12
# Room for two lines of text above each bar.
_GAP = 46
_HEIGHT = 300
# The smallest height of a bar that has bytes: it should be seen.
_LEAST = 2.0
_COLOURS = 8
# Characters of the text above a bar are at most about so wide. The one in the middle takes room on both sides of it.
_CHARACTER = 8.8


def streams(tensors: Sequence[Origin]) -> dict[tuple[str, str, str], float]:
    """Returns the bytes of the result by where they are from; those of several sources are shared out by elements."""
    part, found = part_namer(tensors), defaultdict[tuple[str, str, str], float](float)
    for one in tensors:
        total = sum(leaf.numel for leaf in one.leaves)
        for leaf in one.leaves if total else ():
            found[leaf.source, one.way, part(one.name)] += one.nbytes * leaf.numel / total
        if not total and one.nbytes:
            found[NO_SOURCE, one.way, part(one.name)] += one.nbytes
    return _folded(found)


def _folded(found: Streams) -> dict[tuple[str, str, str], float]:
    shown = [
        folded(_sums(found, column), most, others)
        for column, (most, others) in enumerate(zip(_MOST, _OTHERS, strict=True))
    ]
    result = defaultdict[tuple[str, str, str], float](float)
    for (source, way, part), nbytes in found.items():
        result[shown[0][source], shown[1][way], shown[2][part]] += nbytes
    return dict(result)


def _sums(found: Streams, column: int) -> dict[str, float]:
    sums = defaultdict[str, float](float)
    for key, nbytes in found.items():
        sums[key[column]] += nbytes
    return dict(sums)


@dataclass(slots=True)
class _Bar:
    """A name in a column.

    Attributes
    ----------
    name, nbytes
        What it is, and how much.
    x, y, height
        Where it is drawn, in pixels.
    inward, outward
        How much of its height bands from the left and to the right have taken.
    """

    name: str
    nbytes: float
    x: float
    y: float
    height: float
    inward: float = 0.0
    outward: float = 0.0


class _Columns:
    """The bars of a picture."""

    def __init__(self, found: Streams, width: int) -> None:
        self._found, self._width = found, width
        self._scale = _HEIGHT / (sum(found.values()) or 1)
        sums = [_sums(found, column) for column in range(3)]
        orders: list[list[str]] = [sorted(sums[0], key=lambda name: (-sums[0][name], name))]
        for column in (1, 2):
            orders.append(self._ordered(column, orders[-1]))
        heights = [sum(self._high(nbytes) for nbytes in each.values()) + _GAP * len(each) for each in sums]
        self.height = max(heights) + 8
        self.bars = [self._column(column, orders[column], sums[column], heights[column]) for column in range(3)]

    def _high(self, nbytes: float) -> float:
        return max(nbytes * self._scale, _LEAST)

    def _ordered(self, column: int, before: Sequence[str]) -> list[str]:
        """Names by the mean place of what flows to them, so that few bands cross."""
        weights, places = defaultdict[str, float](float), defaultdict[str, float](float)
        for key, nbytes in self._found.items():
            weights[key[column]] += nbytes
            places[key[column]] += nbytes * before.index(key[column - 1])
        return sorted(weights, key=lambda name: (places[name] / weights[name], -weights[name], name))

    def _column(self, column: int, names: Sequence[str], sums: Mapping[str, float], height: float) -> dict[str, _Bar]:
        x = (self._width - _BAR) * column / 2
        y = (self.height - height) / 2
        bars = {}
        for name in names:
            y += _GAP
            bars[name] = _Bar(name, sums[name], x, y, self._high(sums[name]))
            y += bars[name].height
        return bars


def flow_svg(found: Streams, counts: Mapping[tuple[int, str], int], width: int, kind: str) -> str:
    """Returns the picture.

    Parameters
    ----------
    found
        From ``streams``.
    counts
        Tensors of each name, by its column and itself; names that are not in it show none.
    width
        In pixels.
    kind
        Class of the picture: ``wide`` or ``narrow``.
    """
    columns = _Columns(found, width)
    colours = {name: place % _COLOURS for place, name in enumerate(columns.bars[0])}
    bands = "\n".join(_bands(found, columns, colours))
    bars = "\n".join(
        _bar_svg(bar, column, width, counts.get((column, bar.name)), colours.get(bar.name) if column == 0 else None)
        for column, each in enumerate(columns.bars)
        for bar in each.values()
    )
    return (
        f'<svg class="flow {kind}" viewBox="0 0 {width} {columns.height:.0f}" role="img" '
        f'aria-label="{escaped(described(found))}">\n{bands}\n{bars}\n</svg>'
    )


def described(found: Streams) -> str:
    """Returns the picture in words."""
    parts = [
        f"{human_bytes(round(nbytes))} from {source} to {part}: {way}"
        for (source, way, part), nbytes in sorted(found.items(), key=lambda item: -item[1])
    ]
    more = f"; and {len(parts) - 12} smaller ones" if len(parts) > 12 else ""
    return f"Flow of bytes. {'; '.join(parts[:12])}{more}."


def _bands(found: Streams, columns: _Columns, colours: Mapping[str, int]) -> Iterator[str]:
    places = [{name: place for place, name in enumerate(each)} for each in columns.bars]

    def order(key: tuple[str, str, str]) -> tuple[int, ...]:
        return tuple(places[column][key[column]] for column in range(3))

    for key in sorted(found, key=order):
        text = escaped(f"{key[0]} → {key[2]}: {human_bytes(round(found[key]))}, {key[1]}")
        left = _band(columns.bars[0][key[0]], columns.bars[1][key[1]], found[key])
        yield f'<path class="c{colours[key[0]]}" d="{left}"><title>{text}</title></path>'
    for key in sorted(found, key=lambda key: (places[1][key[1]], places[0][key[0]], places[2][key[2]])):
        text = escaped(f"{key[0]} → {key[2]}: {human_bytes(round(found[key]))}, {key[1]}")
        right = _band(columns.bars[1][key[1]], columns.bars[2][key[2]], found[key])
        yield f'<path class="c{colours[key[0]]}" d="{right}"><title>{text}</title></path>'


def _band(left: _Bar, right: _Bar, nbytes: float) -> str:
    out, into = left.height * nbytes / (left.nbytes or 1), right.height * nbytes / (right.nbytes or 1)
    y0, y1 = left.y + left.outward, right.y + right.inward
    left.outward += out
    right.inward += into
    x0, x1 = left.x + _BAR, right.x
    half = (x0 + x1) / 2
    return (
        f"M{x0:.1f} {y0:.1f}C{half:.1f} {y0:.1f} {half:.1f} {y1:.1f} {x1:.1f} {y1:.1f}V{y1 + into:.1f}"
        f"C{half:.1f} {y1 + into:.1f} {half:.1f} {y0 + out:.1f} {x0:.1f} {y0 + out:.1f}Z"
    )


def _bar_svg(bar: _Bar, column: int, width: int, count: int | None, colour: int | None) -> str:
    anchor, x = (("start", bar.x), ("middle", bar.x + _BAR / 2), ("end", bar.x + _BAR))[column]
    detail = human_bytes(round(bar.nbytes)) + (f" · {count:,}" if count else "")
    name = bar.name if len(bar.name) <= (room := int((width / 2 - 8) / 1.5 / _CHARACTER)) else _cut(bar.name, room)
    mark = "bar" if colour is None else f"bar c{colour}"
    return (
        f'<rect class="{mark}" x="{bar.x:.1f}" y="{bar.y:.1f}" width="{_BAR}" height="{bar.height:.1f}" rx="2"/>'
        f'<text class="name" x="{x:.1f}" y="{bar.y - 21:.1f}" text-anchor="{anchor}">{escaped(name)}'
        f"<title>{escaped(bar.name)}</title></text>"
        f'<text x="{x:.1f}" y="{bar.y - 6:.1f}" text-anchor="{anchor}">{escaped(detail)}</text>'
    )


def _cut(name: str, room: int) -> str:
    """Returns both ends of a name that is too long: the end says more than the middle."""
    head = (room - 1) // 3
    return f"{name[:head]}…{name[head + 1 - room :]}"


def counted(tensors: Iterable[Origin], found: Streams) -> dict[tuple[int, str], int]:
    """Returns how many tensors each source, way and part has, by column and name; folded ones have no count."""
    tensors = list(tensors)
    part, counts = part_namer(tensors), defaultdict[tuple[int, str], int](int)
    for one in tensors:
        for source in dict.fromkeys(leaf.source for leaf in one.leaves):
            counts[0, source] += 1
        counts[1, one.way] += 1
        counts[2, part(one.name)] += 1
    shown = {(column, name) for key in found for column, name in enumerate(key)}
    return {key: count for key, count in counts.items() if key in shown}
