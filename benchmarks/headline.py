"""The one figure and the one sentence that sum the measurements up: beside DeepSpeed, on ZeRO-2 of 2 GiB."""

from __future__ import annotations

from html import escape

from benchmarks.markdown import MIB
from benchmarks.reading import DURABLE, QUICK, Entry, Result, contender, peers, ratio

HEADLINE = "zero2-2g"
# The converter that people use; the others of DeepSpeed are slower or need the same.
_PEER = "zero_to_fp32"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 300, 56, 740, 44, 256

_STYLE = """
  .ground { fill: #fff } text { font: 13px sans-serif; fill: #222 } .quiet { fill: #666 } .title { font-weight: bold }
  .grid { stroke: #e2e4e8 } .peer { fill: #d1495b33; stroke: #d1495b } .ours { fill: #2f6fdb; stroke: #2f6fdb }
  .peer-word { fill: #b0303f } .ours-word { fill: #1f56b3 } .lead { stroke: #2f6fdb }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #16181d } text { fill: #e4e6ea } .quiet { fill: #9aa0aa } .grid { stroke: #2b2f37 }
    .peer { fill: #f0808f33; stroke: #f0808f } .ours { fill: #6ea0ff; stroke: #6ea0ff }
    .peer-word { fill: #f0808f } .ours-word { fill: #8db4ff } .lead { stroke: #6ea0ff }
  }
"""


def headline(result: Result) -> str:
    """Returns the sentence: how much faster, and how much less memory."""
    mine = contender(result, QUICK)
    assert mine is not None
    faster = sorted(ratio(peer, mine)["median"] for peer in peers(result))
    memory = min(ratio(peer, mine, "peak")["median"] for peer in peers(result))
    return (
        f"**{faster[0]:.0f} to {faster[-1]:.0f} times faster than DeepSpeed's own converters, "
        f"in 1/{memory:.0f} of their memory**: "
        f"{result['case']['title']}, medians of {result['rounds']} runs."
    )


def picture(result: Result) -> str:
    """Returns the resident memory of both over time, as SVG that follows the reader's light or dark scheme."""
    peer, mine = contender(result, _PEER), contender(result, DURABLE)
    assert peer is not None
    assert mine is not None
    title = f"Resident memory in MiB: {result['case']['title']}"
    end = max(time for time, *_ in peer["curve"])
    most = max(anonymous + mapped for _, anonymous, mapped in peer["curve"]) / MIB
    step = 1000
    top = step * -(-most // step)

    def x(seconds: float) -> float:
        return _LEFT + seconds / end * (_RIGHT - _LEFT)

    def y(mib: float) -> float:
        return _BOTTOM - mib / top * (_BOTTOM - _TOP)

    def area(entry: Entry, kind: str) -> str:
        points = [(time, (anonymous + mapped) / MIB) for time, anonymous, mapped in entry["curve"]]
        path = " ".join(f"L{x(time):.1f} {y(mib):.1f}" for time, mib in points)
        last = points[-1][0]
        return f'<path class="{kind}" d="M{x(0):.1f} {y(0):.1f} {path} L{x(last):.1f} {y(0):.1f} Z"/>'

    highest = max(peer["curve"], key=lambda point: point[1] + point[2])[0]
    used = mine["peak"]["max"] / MIB
    lines = [
        _text(10, 22, title, "title"),
        *(
            f'<line class="grid" x1="{_LEFT}" y1="{y(mib):.1f}" x2="{_RIGHT}" y2="{y(mib):.1f}"/>'
            for mib in _marks(top)
        ),
        *(_text(_LEFT - 6, y(mib) + 4, f"{mib:,.0f}", "quiet", "end") for mib in _marks(top)),
        area(peer, "peer"),
        area(mine, "ours"),
        *(_text(x(second), _BOTTOM + 18, f"{second:g} s", "quiet", "middle") for second in _seconds(end)),
        _text(
            x(highest) + 8, y(most) + 12, f"DeepSpeed zero_to_fp32: {peer['peak']['max'] / MIB:,.0f} MiB", "peer-word"
        ),
        f'<path class="lead" d="M{_LEFT + 14} {_BOTTOM - 30} V{y(used) - 2:.1f}"/>',
        _text(_LEFT + 10, _BOTTOM - 50, f"shardmerge: {used:.0f} MiB,", "ours-word"),
        _text(_LEFT + 10, _BOTTOM - 34, f"done after {mine['wall']['median']:.1f} s", "ours-word"),
    ]
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
    ground = f'<rect class="ground" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
    return "\n".join(
        [f'{opening} aria-label="{escape(title)}">', f"<style>{_STYLE}</style>", ground, *lines, "</svg>", ""]
    )


def _marks(top: float) -> list[float]:
    return [float(mib) for mib in range(0, int(top) + 1, 1000)]


def _seconds(end: float) -> list[float]:
    step = next(size for size in (1, 2, 5, 10, 20, 50) if end / size <= 10)
    return [float(second) for second in range(0, int(end) + 1, step)]


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'
