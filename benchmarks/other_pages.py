"""Results of other shapes on the page: casts, clones, plans of the largest models, merges of an 8B."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.markdown import MIB, spread, table
from benchmarks.reading import Entry, Result

# Largest first; the rest of a file's blocks follows.
_BLOCKS = ("memory", "tile", "small")


def other_pages(found: Mapping[str, Result]) -> Iterator[str]:
    """Yields the sections of those results that are there; a file that has ``tables`` of its own is left to them."""
    for stem, result in found.items():
        page = _PAGES.get(stem.partition("-")[0] if stem.startswith("clone-") else stem)
        if page and "case" not in result and "tables" not in result:
            yield from page(stem, result)


def origin(stem: str, result: Entry) -> str:
    """Returns which file and code a section is from."""
    facts = [f"`{stem}`"]
    if result.get("date"):
        facts.append(str(result["date"]))
    if result.get("commit"):
        facts.append(f"commit {result['commit'][:12]}" + (" with changes" if result.get("changed_since") else ""))
    return ", ".join(facts) + ".\n"


# ---- benchmarks.casts


def _casts(stem: str, result: Result) -> Iterator[str]:
    yield "## Casts beside torch\n"
    yield (
        "GB/s of input, and in brackets shardmerge over torch: above 1 shardmerge is faster, below it stands in "
        f"**bold**. Medians of {result['rounds']} rounds. `tile` is 2 MiB that stay in the cache, as in a conversion, "
        "`memory` 32 tiles in turn, which no cache holds, `small` 128 KiB; x1 and x2 are threads. shardmerge counts "
        "overflows on the way, torch does not.\n"
    )
    yield origin(stem, result)
    rows = {(row["source"], row["target"], row["block"], row["threads"]): row for row in result["rows"]}
    pairs = list(dict.fromkeys(key[:2] for key in rows))
    blocks = sorted({key[2] for key in rows}, key=lambda block: _BLOCKS.index(block) if block in _BLOCKS else 9)
    ways = [(block, threads) for block in blocks for threads in sorted({key[3] for key in rows})]
    columns = ["", *(f"{block} x{threads}" for block, threads in ways)]
    yield from table(columns, ([f"{a} to {b}", *(_speed(rows.get((a, b, *way))) for way in ways)] for a, b in pairs))
    sums = result.get("crc32", {})
    if sums:
        figures = ", ".join(f"{name} {speed['median']:.1f}" for name, speed in sums.items())
        yield f"CRC-32 of a tile, GB/s: {figures}.\n"


def _speed(row: Entry | None) -> str:
    if row is None:
        return ""
    ratio = row["ratio"]["median"]
    shown = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
    return f"{row['shardmerge']['median']:.1f} ({shown})"


# ---- benchmarks.clone


def _clone(stem: str, result: Result) -> Iterator[str]:
    where = result["machine"].get("file_system") or result["kind"]
    yield f"## Rename {result['size'] / (1 << 30):.1f} GiB on {where}\n"
    yield (
        "A merge that only renames, beside `cp --reflink=never`: seconds, and space that the file system lost. "
        f"{result['rounds']} rounds, warm page cache.\n"
    )
    yield origin(stem, result)
    columns = ["", "wall s", "x its cp", "CPU s", "peak MiB", "cloning s", "cloned MB", "new space"]
    rows = []
    for key, entry in result["contenders"].items():
        ours = key in result["wall_ratios"]
        rows.append(
            [
                key,
                spread(entry["wall"], digits=3),
                spread(result["wall_ratios"].get(key, {}), digits=3),
                f"{entry['cpu']['median']:.2f}",
                f"{entry['peak']['median'] / MIB:.0f}" if ours else "",
                f"{entry['clone_seconds']['median']:.4f}" if "clone_seconds" in entry else "",
                f"{entry['bytes_cloned']['median'] / 1e6:,.0f}" if "bytes_cloned" in entry else "",
                f"{100 * result['new_space_share'][key]:.1f} %",
            ]
        )
    yield from table(columns, rows)


# ---- benchmarks.scale


def _planning(stem: str, result: Result) -> Iterator[str]:
    yield "## Plans of the largest models\n"
    yield "Headers and names are true, the data are holes. `plan`, and `convert --dry-run`; whole processes.\n"
    columns = ["", "command", "files", "tensors", "wall s", "CPU s", "peak MiB", "plan as JSON, MB"]
    rows = [
        [run["about"], what, run["files"], seen["tensors"], seen["wall"], seen["cpu"], *_plan_sizes(seen)]
        for run in result["runs"].values()
        for what, seen in run.items()
        if isinstance(seen, Mapping) and "wall" in seen
    ]
    yield from table(columns, rows, words=2)
    yield from sorted({origin(stem, run) for run in result["runs"].values()})


def _plan_sizes(seen: Entry) -> tuple[str, str]:
    return f"{seen['peak'] / MIB:.0f}", f"{seen['printed'] / 1e6:.1f}"


# ---- benchmarks.memory_8b


def _merges(stem: str, result: Result) -> Iterator[str]:
    yield "## Memory of merges of a LLaMA-3-8B\n"
    yield (
        "One run each, from holes (all values are zeros), synced. The default budget is 256 MiB. Those with a limit "
        "ran in a memory control group of so many MiB, page cache included.\n"
    )
    rows = []
    for run in result["runs"].values():
        figures = [f"{run[key] / 1e9:.1f}" for key in ("total_size", "bytes_read")]
        # Of the largest process, or what all of them together had at once, without file pages.
        peaks = [f"{size / MIB:.0f}" for size in (max(run["peak"], run["anonymous"]), run["planned_peak"])]
        limit = f"{run['limit'] / MIB:.0f}" if run.get("limit") else ""
        rows.append([run["about"], run["layers"], *figures, f"{run['wall']:.0f}", *peaks, limit])
    columns = ["", "layers", "written GB", "read GB", "wall s", "peak MiB", "what the plan promised", "limit MiB"]
    yield from table(columns, rows)
    yield from sorted({origin(stem, run) for run in result["runs"].values()})


# ---- benchmarks.digests


def _digests(stem: str, result: Result) -> Iterator[str]:
    yield "## What --sha256 costs\n"
    yield (
        "The same conversion with `--sha256` and without, in turn; ratios round by round. "
        f"{result['rounds']} rounds, warm page cache.\n"
    )
    yield origin(stem, result)
    rows = [
        [found["title"], key, *(spread(found["runs"][f"{key}{way}"]["wall"]) for way in ("", " --sha256")),
         *(spread(ratios[what]) for what in ("wall", "cpu"))]
        for found in result["cases"].values()
        for key, ratios in found["ratios"].items()
    ]  # fmt: skip
    yield from table(["", "", "wall s", "with --sha256", "x wall", "x CPU"], rows, words=2)


_PAGES: dict[str, Callable[[str, Result], Iterator[str]]] = {
    "casts": _casts,
    "clone": _clone,
    "digests": _digests,
    "planning": _planning,
    "memory-8b": _merges,
}
