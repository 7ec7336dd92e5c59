"""Throughput and resident memory over the time of a run, one above the other, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import floor, log10

from shardmerge.reports.markup import escaped
from shardmerge.reports.run import Run

_LEFT, _RIGHT, _TOP, _PANEL, _BETWEEN, _BOTTOM = 52, 14, 48, 120, 40, 26
_HEIGHT = _TOP + 2 * _PANEL + _BETWEEN + _BOTTOM
# Characters of a phase's name are about so wide, in pixels.
_CHARACTER = 7.5
# Fewer points make no curve.
FEWEST_POINTS = 5

_Place = Callable[[float], float]


def chart_svg(run: Run, width: int, kind: str) -> str:
    """Returns the picture for a width in pixels; ``kind`` is its class, ``wide`` or ``narrow``."""
    inner = width - _LEFT - _RIGHT
    end = run.seconds or 1.0

    def x(seconds: float) -> float:
        return _LEFT + inner * seconds / end

    lines = [
        *_phases(run, x, width),
        *_panel("GB/s written", _rates(run), 0.0, _TOP, (x, width), "rate"),
        *_panel("MiB resident", _memory(run), run.planned_peak / 2**20, _TOP + _PANEL + _BETWEEN, (x, width), "memory"),
        *_seconds(end, x, many=width > 500),
        f'<line class="hair" x1="0" x2="0" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" hidden/>',
    ]
    body = "\n".join(lines)
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {_HEIGHT}" role="img" data-left="{_LEFT}" '
        f'data-inner="{inner}" data-end="{end}" aria-label="{escaped(described(run))}">\n{body}\n</svg>'
    )


def described(run: Run) -> str:
    """Returns the picture in words."""
    rates = [rate for _, _, rate in _rates(run)]
    phases = ", ".join(f"{name} from {begin:.2f} s" for name, begin in run.phases)
    return (
        f"Throughput and memory over {run.seconds:.2f} seconds: {phases}. "
        f"At most {max(rates, default=0):.2f} GB/s written, at most {run.peak / 2**20:.0f} MiB resident, "
        f"planned {run.planned_peak / 2**20:.0f} MiB."
    )


def _rates(run: Run) -> list[tuple[float, float, float]]:
    """Returns begin, end and GB/s between each two points; what an earlier run had made is not of this one."""
    points = [(point.seconds, max(point.done - run.kept, 0)) for point in run.points]
    return [(a, b, (y - x) / (b - a) / 1e9) for (a, x), (b, y) in pairwise(points) if b > a]


def _memory(run: Run) -> list[tuple[float, float, float]]:
    return [(a.seconds, b.seconds, max(a.resident, b.resident) / 2**20) for a, b in pairwise(run.points)]


def _phases(run: Run, x: _Place, width: int) -> Iterator[str]:
    ends = [*(begin for _, begin in run.phases[1:]), run.seconds]
    free = 0.0
    for place, ((name, begin), end) in enumerate(zip(run.phases, ends, strict=True)):
        left, right = x(begin), x(end)
        height = _HEIGHT - _BOTTOM - _TOP
        yield (
            f'<rect class="phase p{place % 2}" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0):.1f}" '
            f'height="{height}"><title>{escaped(name)}: {end - begin:.2f} s</title></rect>'
        )
        start = min(left + 3, width - _RIGHT - _CHARACTER * len(name))
        if start >= free:
            yield f'<text x="{start:.1f}" y="{_TOP - 28}">{escaped(name)}</text>'
            free = start + _CHARACTER * len(name)


def _panel(
    title: str,
    steps: Sequence[tuple[float, float, float]],
    limit: float,
    top: int,
    frame: tuple[_Place, int],
    kind: str,
) -> Iterator[str]:
    """Yields axis, area and line of one quantity, and where it has one its limit, if that is not far above."""
    x, width = frame
    highest = max((value for _, _, value in steps), default=0.0)
    ticks = _ticks(max(highest, limit))
    bottom = top + _PANEL

    def y(value: float) -> float:
        return bottom - _PANEL * value / ticks[-1]

    for tick in ticks:
        yield f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,g}</text>'
    yield f'<text class="name" x="{_LEFT}" y="{top - 9}">{escaped(title)}</text>'
    if steps:
        path = "".join(f"L{x(begin):.1f} {y(value):.1f}H{x(end):.1f}" for begin, end, value in steps)
        first = x(steps[0][0])
        yield f'<path class="area {kind}" d="M{first:.1f} {bottom}{path}V{bottom}Z"/>'
        yield f'<path class="line {kind}" d="M{path[1:]}"/>'
    if limit:
        yield f'<line class="limit" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>'
        yield (
            f'<text x="{width - _RIGHT - 4}" y="{y(limit) - 5:.1f}" text-anchor="end">'
            f"planned at most {limit:.0f} MiB</text>"
        )


def _seconds(end: float, x: _Place, *, many: bool) -> Iterator[str]:
    ticks = [tick for tick in _ticks(end) if tick <= end * 1.0001]
    for tick in ticks if many else ticks[:: max(len(ticks) // 4, 1)]:
        yield f'<text x="{x(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{tick:,g} s</text>'


def _ticks(largest: float) -> list[float]:
    """Returns round numbers from zero to at least the largest."""
    if largest <= 0:
        return [0.0, 1.0]
    step = 10.0 ** floor(log10(largest))
    step = next(size for size in (step / 5, step / 2, step, 2 * step) if largest / size <= 5)
    count = -int(-largest // step)
    return [round(step * index, 10) for index in range(count + 1)]
