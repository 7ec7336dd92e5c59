"""A case on the page: ratios, figures, plots."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.markdown import MIB, mebibytes, megabytes, spread, table
from benchmarks.plots import Bar, Line, bars, curves
from benchmarks.reading import (
    DURABLE,
    QUICK,
    Entry,
    Result,
    contender,
    floor_of,
    output_bytes,
    peers,
    ratio,
    synced,
)


def case_page(stem: str, result: Result) -> Iterator[str]:
    """Yields the lines of one case."""
    case = result["case"]
    cold = " (cold)" if stem.endswith("-cold") else ""
    yield f"## {case['title']}{cold}\n"
    commit = result["commit"][:12] + (" with changes" if result["changed_since"] else "")
    cache = result.get("cache", "warm; the floor is a copy alone, without reading the input")
    yield f"{case['about']}\n"
    yield f"`{stem}`: {result['rounds']} rounds, {result['date']}, commit {commit}. Page cache {cache}.\n"
    yield f"![throughput](plots/{stem}-throughput.svg)\n"
    yield from _beside_peers(result)
    yield from _figures(result)
    yield from _bytes(result)
    if _has_curves(result):
        yield f"![memory over time](plots/{stem}-memory.svg)\n"
    yield _promise(result)
    yield from (f"- Checked: {check}." for check in result["checks"])
    yield from (f"- Not measured: {missing}." for missing in result.get("missing", ()))
    yield ""


def case_plots(stem: str, result: Result) -> dict[str, str]:
    """Returns the plots of one case by name."""
    title, nbytes = result["case"]["title"], output_bytes(result)
    rows = [
        Bar(short_title(entry), nbytes / entry["wall"]["median"] / 1e9, entry["kind"]) for entry in result["contenders"]
    ]
    found = {f"{stem}-throughput.svg": bars(title, "GB/s of output, by the median", rows)}
    if _has_curves(result):
        lines = [
            Line(
                short_title(entry),
                [(0.0, 0.0), *((t, (anonymous + mapped) / MIB) for t, anonymous, mapped in entry["curve"])],
            )
            for entry in result["contenders"]
            if entry.get("curve")
        ]
        found[f"{stem}-memory.svg"] = curves(
            f"Memory: {title}", ("seconds", "resident MiB, file pages included"), lines
        )
    return found


def summary(results: dict[str, Result]) -> Iterator[str]:
    """Yields one table over all cases."""
    columns = [
        "",
        "durable / synced floor",
        "--no-sync / floor",
        "fastest peer",
        "that is slower by",
        "and needs",
        "peak MiB",
    ]
    yield from table(columns, (_summary_row(stem, result) for stem, result in results.items()))


def _summary_row(stem: str, result: Result) -> list[str]:
    durable, quick = contender(result, DURABLE), contender(result, QUICK)
    assert durable is not None
    assert quick is not None
    others = peers(result)
    cells = ["", "", ""]
    if others:
        best = min(others, key=lambda entry: float(entry["wall"]["median"]))
        cells = [
            short_title(best),
            f"{ratio(best, quick)['median']:.1f} x",
            f"{ratio(best, quick, 'peak')['median']:.0f} x the memory",
        ]
    return [
        f"`{stem}`",
        f"{ratio(durable, floor_of(result, synced=True))['median']:.2f}",
        f"{ratio(quick, floor_of(result, synced=False))['median']:.2f}",
        *cells,
        f"{max(durable['peak']['max'], quick['peak']['max']) / MIB:.0f}",
    ]


def _beside_peers(result: Result) -> Iterator[str]:
    """Peers do not wait for the disk, so they are compared with ``--no-sync``."""
    mine, others = contender(result, QUICK), peers(result)
    if not others or mine is None:
        return
    yield "shardmerge --no-sync divided by each; **bold** where shardmerge needs more.\n"
    figures = ("wall", "cpu", "peak", "anonymous", "cgroup")
    columns = ["beside", "faster by", "wall", "CPU", "peak memory", "anonymous", "with page cache"]
    yield from table(
        columns,
        (
            [
                entry["title"],
                f"{ratio(entry, mine)['median']:.1f} x",
                *(_times(ratio(mine, entry, name)) for name in figures),
            ]
            for entry in others
        ),
    )


def _figures(result: Result) -> Iterator[str]:
    columns = ["", "wall s", "x its floor", "CPU s", "peak MiB", "anonymous", "file pages", "with page cache"]
    rows = []
    for entry in result["contenders"]:
        floor = floor_of(result, synced=synced(entry))
        over = "" if entry is floor else spread(ratio(entry, floor))
        resident = ["", "", ""]
        if entry["kind"] != "floor":
            resident = [mebibytes(entry.get(name)) for name in ("peak", "anonymous", "mapped")]
        rows.append(
            [
                entry["title"],
                spread(entry["wall"]),
                over,
                spread(entry["cpu"]),
                *resident,
                mebibytes(entry.get("cgroup")),
            ]
        )
    yield from table(columns, rows)


def _bytes(result: Result) -> Iterator[str]:
    """What moved; schema 1 has sizes of files alone."""
    if "needed_bytes" not in result:
        return
    yield (
        f"{result['needed_bytes'] / 1e6:,.0f} MB must be read, {result['output_bytes'] / 1e6:,.0f} MB must be written. "
        "Reads of mapped files are no calls, and show only where they reach the disk.\n"
    )
    columns = ["MB", "files written", "read by calls", "written by calls", "read from disk", "written to disk"]
    names = ("written", "rchar", "wchar", "read_bytes", "write_bytes")
    rows = ([entry["title"], *(megabytes(entry.get(name)) for name in names)] for entry in result["contenders"])
    yield from table(columns, rows)


def _promise(result: Result) -> str:
    found = [entry for entry in result["contenders"] if entry["kind"] == "ours"]
    promised = min(entry["planned_peak"]["min"] for entry in found)
    measured = max(entry["peak"]["max"] for entry in found)
    verdict = "**which is more than promised**" if measured > promised else "as promised"
    figures = f"promised at most {promised / MIB:.1f} MiB; at most {measured / MIB:.1f} were used"
    return f"shardmerge's plan {figures}, {verdict}.\n"


def _has_curves(result: Result) -> bool:
    return any(entry.get("curve") for entry in result["contenders"])


def short_title(entry: Entry) -> str:
    """Returns the title of a contender as far as a plot has room for it."""
    words = str(entry["title"]).split(" (")[0].split(", which")[0]
    return words if len(words) <= 58 else words.split(":")[0]


def _times(found: dict[str, float]) -> str:
    if not found:
        return ""
    middle = f"{found['median']:.2f}"
    shown = f"**{middle}**" if found["median"] > 1 else middle
    return f"{shown} ({found['min']:.2f} to {found['max']:.2f})"
