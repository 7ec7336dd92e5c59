"""What the page says first: warnings, figures, the flow of bytes, and what was done to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from shardmerge.plan.tables import human_bytes
from shardmerge.reports.flow import counted, flow_svg, streams
from shardmerge.reports.markup import code, escaped, table
from shardmerge.reports.operations import KINDS
from shardmerge.reports.provenance import Origin, Provenance
from shardmerge.reports.run import Run

# Pictures are drawn for these widths, in pixels: on a desk, and on a phone.
WIDE, NARROW = 1060, 358
# Names that are listed before the rest is counted.
_MOST_NAMES = 200


def counts(count: int, noun: str) -> str:
    """Returns ``1 tensor`` or ``291 tensors``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def warnings(found: Provenance) -> str:
    """Returns what the plan warned of, and casts that overflowed; nothing where there is nothing to say."""
    lines = [escaped(warning) for warning in found.warnings]
    lines += [
        f"{counts(one.overflowed, 'value')} of {code(one.name)} overflowed in the cast"
        for one in found.tensors
        if one.overflowed
    ]
    if not lines:
        return ""
    items = "".join(f"<li>{line}</li>" for line in _cut(lines))
    head = '<section class="warnings" aria-labelledby="warnings"><h2 id="warnings">Warnings</h2>'
    return f"{head}<ul>{items}</ul></section>"


def summary(found: Provenance, run: Run | None) -> str:
    """Returns the figures."""
    tiles = [
        ("Parameters", _human(found.numel), " + ".join(sorted({one.dtype for one in found.tensors}))),
        ("Size", human_bytes(found.nbytes), counts(len(found.shards), "file") + " of weights"),
        ("Tensors", f"{len(found.tensors):,}", _not_used(len(found.unused))),
        *(_tiles_of(run) if run else ()),
    ]
    cells = "".join(
        f'<div><dt>{title}</dt><dd>{escaped(value)}</dd><dd class="more">{escaped(more)}</dd></div>'
        for title, value, more in tiles
    )
    return f'<dl class="tiles" id="summary">{cells}</dl>'


def _not_used(count: int) -> str:
    return f"{counts(count, 'source tensor')} left out" if count else "all source tensors used"


def _tiles_of(run: Run) -> Iterator[tuple[str, str, str]]:
    yield "Time", f"{run.seconds:.1f} s", f"{run.rate / 1e9:.2f} GB/s, planning and publishing included"
    yield "Peak memory", f"{run.peak / 2**20:.0f} MiB", f"planned at most {run.planned_peak / 2**20:.0f} MiB"


def _human(count: int) -> str:
    for size, word in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.2f} {word}"
    return f"{count:,}"


def flow(found: Provenance) -> str:
    """Returns the picture, and the same as a table."""
    bytes_by = streams(found.tensors)
    if not bytes_by:
        return ""
    numbers = counted(found.tensors, bytes_by)
    pictures = "\n".join(
        flow_svg(bytes_by, numbers, width, kind) for width, kind in ((WIDE, "wide"), (NARROW, "narrow"))
    )
    rows = (
        (code(source), escaped(way), code(part), escaped(human_bytes(round(nbytes))))
        for (source, way, part), nbytes in sorted(bytes_by.items(), key=lambda item: -item[1])
    )
    same = table(("Source", "Operation", "Part of the model", "Bytes"), rows, caption="Flow of bytes", numbers=(3,))
    return (
        '<section aria-labelledby="flow"><h2 id="flow">Where the bytes come from</h2>'
        "<p>From each source, through what was done, to the parts of the model. Widths are bytes of the result; "
        "the second number counts tensors.</p>"
        '<div class="columns" aria-hidden="true"><span>source</span><span>operation</span><span>result</span></div>'
        f"\n{pictures}\n<details><summary>The same as a table</summary>{same}</details></section>"
    )


def kinds(found: Provenance) -> str:
    """Returns what was done to the tensors, and which have other rows than their source."""
    groups: dict[str, list[Origin]] = defaultdict(list)
    for one in found.tensors:
        groups[one.kind].append(one)
    present = [kind for kind in KINDS if kind in groups]
    sizes = {kind: sum(one.nbytes for one in groups[kind]) for kind in present}
    bar = "".join(
        f'<span class="k-{kind}" style="flex:{sizes[kind]}" title="{kind}: {escaped(human_bytes(sizes[kind]))}"></span>'
        for kind in present
        if sizes[kind]
    )
    rows = [
        (
            f'<span class="swatch k-{kind}"></span>{kind}',
            f"{len(groups[kind]):,}",
            escaped(human_bytes(sizes[kind])),
            escaped(KINDS[kind]),
            _ways(groups[kind]),
        )
        for kind in present
    ]
    heads = ("What", "Tensors", "Bytes", "Meaning", "Operations")
    whole = table(heads, rows, caption="What was done to the tensors", numbers=(1, 2))
    return (
        '<section aria-labelledby="kinds"><h2 id="kinds">What was done</h2>'
        "<p>Each tensor is counted once. The bar shows the share of bytes.</p>"
        f'<div class="stack" aria-hidden="true">{bar}</div>{whole}{_resized(groups["resized"])}</section>'
    )


def _ways(group: Sequence[Origin]) -> str:
    found: dict[str, int] = defaultdict(int)
    for one in group:
        found[one.way] += 1
    ways = sorted(found, key=lambda way: (-found[way], way))
    return "<br>".join(_cut([escaped(way) for way in ways if way != group[0].kind], 6))


def _resized(group: Sequence[Origin]) -> str:
    if not group:
        return ""
    items = (f"<li>{code(one.name)}: {escaped(one.how)}</li>" for one in group)
    return f"<h3>Grown vocabulary</h3><ul>{''.join(_cut(items))}</ul>"


def unused(found: Provenance) -> str:
    """Returns what of the sources was not taken, by the reason."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source, tensor, reason in found.unused:
        groups[source, reason.partition(":")[0]].append(tensor)
    if not groups:
        return ""
    blocks = "".join(_unused_group(source, reason, names) for (source, reason), names in sorted(groups.items()))
    return (
        '<section aria-labelledby="unused"><h2 id="unused">What was left out</h2>'
        "<p>Source tensors that are not in the result: dropped by a rule, shadowed by an earlier source, or tied.</p>"
        f"{blocks}</section>"
    )


def _unused_group(source: str, reason: str, names: Sequence[str]) -> str:
    listed = "<br>".join(_cut([code(name) for name in names]))
    head = f"{counts(len(names), 'tensor')} of {code(source)}: {escaped(reason)}"
    return f"<details><summary>{head}</summary><p>{listed}</p></details>"


def _cut(lines: Iterable[str], most: int = _MOST_NAMES) -> list[str]:
    """Returns the first lines, and how many more there are."""
    lines = list(lines)
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most:,} more"]
