"""The tables and the picture of a day's work in docs/reliability.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from docs.markdown import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "soak" / "day.json"
PICTURE = "pictures/day.svg"

_WIDTH, _STRIP, _LEFT, _TOP = 760, 110, 20, 10
_STYLE = """
  text { font: 12px sans-serif; fill: #222 }
  .ground { fill: #fff } .base { stroke: #bbb }
  polyline { fill: none; stroke: #2f6fdb; stroke-width: 1.6 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e6ea } .ground { fill: #16181d } .base { stroke: #555 } polyline { stroke: #6ea0ff }
  }
"""


def day_of_work() -> list[str]:
    """Returns the lines of the tables: what was done, what happened to it, and what was found."""
    read = json.loads(RESULTS.read_text("utf-8"))
    told = (
        f"Measured on {read['date']}, Linux {read['kernel']}, by `python -m tests.day` "
        f"(seed {read['seed']}). It ran for {read['minutes']:g} minutes on {read['cpus']} CPUs, beside other work."
    )
    head = ("what", "count")
    return [told, "", *table(head, list(_done(read))), "", *table(("event", "times"), list(_events(read)))]


def _done(read: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counts, service = read["counts"], read["service"]
    moved, mib = counts["bytes"], 1 << 20
    yield "commands", f"{_sum(counts['exit codes']):,}"
    yield "calls of the Python API, in one process", f"{_sum(counts['API calls']):,}"
    yield "of these, calls that failed, were refused, cancelled or interrupted", f"{_failed(counts['API calls']):,}"
    yield "results compared with the first one, byte for byte", f"{_sum(counts['results']):,}"
    yield "tensors published by runs that succeeded", f"{moved['total_size'] / 1e9:,.1f} GB"
    yield "of these, cloned by the file system", f"{moved['bytes_cloned'] / 1e9:,.1f} GB"
    yield "signals sent to runs and their workers", f"{_sum(_sent(counts['kills'])):,}"
    yield "exit codes", ", ".join(f"{code}: {count:,}" for code, count in counts["exit codes"].items())
    yield "**violations**", f"**{len(read['violations'])}**"
    yield "processes killed by their memory group", str(_sum(counts.get("killed for memory", {})))
    yield "largest peak, as a share of the planned one", f"{read['largest share of the planned peak']:.2f}"
    least, most = service["descriptors at least"], service["descriptors at most"]
    yield "descriptors of the process that uses the API", f"{least}" if least == most else f"{least} to {most}"
    quarters = ", ".join(f"{most / mib:.1f}" for most in _quarters([point[1] for point in read["curve"]]))
    yield "its resident memory at most, in each quarter of the time", f"{quarters} MiB"


def _quarters(values: Sequence[float]) -> list[float]:
    """Returns the most of each quarter: in the first one all is imported and done once."""
    cuts = [len(values) * part // 4 for part in range(5)]
    return [max(values[begin:end]) for begin, end in pairwise(cuts) if begin < end]


def _events(read: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, count in sorted(read["counts"]["events"].items(), key=lambda one: -one[1]):
        yield name, f"{count:,}"


def _sum(counts: Mapping[str, int]) -> int:
    return sum(counts.values())


def _sent(kills: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in kills.items() if name != "too late"}


def _failed(calls: Mapping[str, int]) -> int:
    return _sum({name: count for name, count in calls.items() if not name.endswith(": done")})


def day_picture() -> str:
    """Returns the picture: three strips over the same time."""
    curve: Sequence[Sequence[float]] = json.loads(RESULTS.read_text("utf-8"))["curve"]
    strips = (
        ("resident memory of the process that uses the API, MiB", 1, 1 << 20),
        ("its open descriptors, during calls too", 2, 1),
        ("staging directories, GB", 3, 10**9),
    )
    height = _TOP + len(strips) * _STRIP + 26
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'aria-label="Resident memory, descriptors and staging bytes over the run">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}"/>',
    ]
    for index, (words, column, unit) in enumerate(strips):
        points = [(point[0] / 60, point[column] / unit) for point in curve]
        lines += _strip(_TOP + index * _STRIP, words, points)
    last = curve[-1][0] / 60
    lines += [
        f'<text x="{_LEFT}" y="{height - 10}">minute 0</text>',
        f'<text x="{_WIDTH - _LEFT}" y="{height - 10}" text-anchor="end">minute {last:.0f}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _strip(top: float, words: str, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    bottom, most = top + _STRIP - 14, max(value for _, value in points) or 1.0
    across, up = (_WIDTH - 2 * _LEFT) / (points[-1][0] or 1.0), (_STRIP - 44) / most
    path = " ".join(f"{_LEFT + x * across:.1f},{bottom - y * up:.1f}" for x, y in points)
    yield f'<text x="{_LEFT}" y="{top + 16}">{words}: at most {most:,.4g}</text>'
    yield f'<line class="base" x1="{_LEFT}" y1="{bottom}" x2="{_WIDTH - _LEFT}" y2="{bottom}"/>'
    yield f'<polyline points="{path}"/>'
