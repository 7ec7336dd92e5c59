"""Plots as small SVG files: bars, and lines over a linear or doubling axis. The same numbers give the same bytes.

They carry their own ground and follow the reader's light or dark scheme, so that they can stand on any page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log2, log10

Point = tuple[float, float]

_WIDTH = 760
_STYLE = """
  .ground { fill: #fff }
  text { font: 12px sans-serif; fill: #222 }
  .title { font-weight: bold; font-size: 13px }
  .axis { stroke: #999; stroke-width: 1 }
  .grid { stroke: #ddd; stroke-width: 1 }
  .ours { fill: #2f6fdb } .peer { fill: #b0752a } .floor { fill: #8a8f98 }
  .s0 { stroke: #2f6fdb } .s1 { stroke: #d1495b } .s2 { stroke: #2e8b57 } .s3 { stroke: #b0752a }
  .s4 { stroke: #7d5ba6 } .s5 { stroke: #1b8a9a } .s6 { stroke: #8a8f98 } .s7 { stroke: #a0522d }
  polyline { fill: none; stroke-width: 1.8 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #16181d }
    text { fill: #e4e6ea }
    .axis { stroke: #777 } .grid { stroke: #33373f }
    .ours { fill: #6ea0ff } .peer { fill: #e0a458 }
    .s0 { stroke: #6ea0ff } .s1 { stroke: #f0808f } .s2 { stroke: #6cc796 } .s3 { stroke: #e0a458 }
    .s4 { stroke: #b79be0 } .s5 { stroke: #5ec8d8 } .s7 { stroke: #d98e6a }
  }
"""
_SERIES = 8


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: its words, its value, and the kind of contender (``ours``, ``peer`` or ``floor``)."""

    label: str
    value: float
    kind: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line: its words and its points, x ascending."""

    label: str
    points: Sequence[Point]


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """Returns a plot of bars, one below the other, with the value behind each."""
    left, row, top = 400, 22, 34
    height = top + row * len(rows) + 10
    scale = (_WIDTH - left - 70) / max((bar.value for bar in rows), default=1)
    lines = [_text(10, 20, f"{title} ({unit})", kind="title")]
    for index, bar in enumerate(rows):
        y = top + row * index
        lines += [
            _text(left - 8, y + 14, bar.label, "end"),
            f'<rect class="{bar.kind}" x="{left}" y="{y + 3}" width="{max(bar.value * scale, 1):.1f}" height="14"/>',
            _text(
                left + max(bar.value * scale, 1) + 6,
                y + 14,
                f"{bar.value:.2f}" if bar.value >= 0.1 else f"{bar.value:.3f}",
            ),
        ]
    return _document(title, height, lines)


def curves(title: str, axes: tuple[str, str], series: Sequence[Line], *, doubling: bool = False) -> str:
    """Returns a plot of lines.

    Parameters
    ----------
    axes
        The words of x and y. y starts at zero.
    series
        The lines; their words stand below the plot.
    doubling
        Whether x is logarithmic, with a mark at each point of the first line.
    """
    frame = _Frame(series, doubling=doubling)
    lines = [_text(10, 20, title, kind="title"), *frame.grid(axes)]
    for index, line in enumerate(series):
        points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
        lines.append(f'<polyline class="s{index % _SERIES}" points="{points}"/>')
    for index, line in enumerate(series):
        y = frame.bottom + 58 + 18 * index
        lines.append(f'<polyline class="s{index % _SERIES}" points="60,{y - 4} 84,{y - 4}"/>')
        lines.append(_text(92, y, line.label))
    return _document(title, frame.bottom + 58 + 18 * len(series), lines)


class _Frame:
    """Where values lie on the picture."""

    left, right, top, bottom = 60, _WIDTH - 20, 54, 294

    def __init__(self, series: Sequence[Line], *, doubling: bool) -> None:
        points = [point for line in series for point in line.points]
        self._doubling = doubling
        self._marks = [x for x, _ in series[0].points] if doubling else _ticks(max(x for x, _ in points))
        self._heights = _ticks(max(y for _, y in points))
        xs = [x for x, _ in points] + ([] if doubling else self._marks[-1:])
        self._low = log2(min(xs)) if doubling else 0.0
        self._high = log2(max(xs)) if doubling else max(xs)

    def x(self, value: float) -> float:
        share = ((log2(value) if self._doubling else value) - self._low) / ((self._high - self._low) or 1.0)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - value / (self._heights[-1] or 1.0) * (self.bottom - self.top)

    def grid(self, axes: tuple[str, str]) -> Iterator[str]:
        for height in self._heights:
            y = self.y(height)
            yield f'<line class="grid" x1="{self.left}" y1="{y:.1f}" x2="{self.right}" y2="{y:.1f}"/>'
            yield _text(self.left - 6, y + 4, f"{height:,g}", "end")
        for mark in self._marks:
            yield _text(self.x(mark), self.bottom + 16, f"{mark:,g}", "middle")
        yield f'<line class="axis" x1="{self.left}" y1="{self.bottom}" x2="{self.right}" y2="{self.bottom}"/>'
        yield _text((self.left + self.right) / 2, self.bottom + 34, axes[0], "middle")
        yield _text(10, 40, axes[1])


def _ticks(largest: float) -> list[float]:
    """Returns round numbers from zero to at least the largest, four to ten of them."""
    if largest <= 0:
        return [0.0, 1.0]
    step = 10.0 ** floor(log10(largest))
    step = next(size for size in (step / 5, step / 2, step, 2 * step) if largest / size <= 8)
    count = -int(-largest // step)
    return [round(step * index, 10) for index in range(count + 1)]


def _document(title: str, height: float, lines: Sequence[str]) -> str:
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" role="img"'
    ground = f'<rect class="ground" width="{_WIDTH}" height="{height:g}"/>'
    parts = [f'{opening} aria-label="{escape(title)}">', f"<style>{_STYLE}</style>", ground, *lines, "</svg>"]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{name}>{escape(words)}</text>'
