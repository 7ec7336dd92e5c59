"""Renders docs/benchmarks.md, the page of measurements behind it, and the plots, from the result files. No measuring.

``python -m benchmarks.report`` writes them.

Besides the cases of `benchmarks.run` any result file may carry ``tables`` (``title``, ``about``, ``columns``, ``rows``)
and ``plots`` (``key``, ``title``, ``axes``, ``doubling``, ``series`` of ``label`` and ``points``), which are shown as
they are, below the file's own ``title`` and ``about``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.answers import answers
from benchmarks.case_pages import case_page, case_plots, summary
from benchmarks.headline import HEADLINE, picture
from benchmarks.markdown import table
from benchmarks.other_pages import origin, other_pages
from benchmarks.plots import Line, curves
from benchmarks.reading import Result, cases, machines, read

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
ANSWERS, PAGE, PLOTS = "benchmarks.md", "benchmarks-details.md", "plots"

_HEAD = """\
# All measurements

The answers in short are on [Benchmarks](benchmarks.md).

Written by `python -m benchmarks.report` from `benchmarks/results/*.json`, where every single run is. Take the ratios,
not the absolute figures: those belong to the machine below. `shardmerge bench` measures yours.

How it was measured:

- Whole processes, from outside: interpreter start and imports count. Wall clock, CPU (user + system) and peak resident
  memory are those of `wait4`, children included. *Anonymous* is what a system short of memory cannot take back, *file
  pages* what it can; both are sampled 50 times a second. *With page cache* is the peak of a memory control group of its
  own: also the pages that the run brought into the cache or wrote.
- All contenders of a case run in turn, round after round, in an order drawn for each. Ratios are taken inside each
  round, and the tables show their median and, in brackets, the smallest and the largest.
- Cold or warm is said with each case. What the contender before left unwritten is synced before the next one starts,
  and outputs are removed, outside of the clock.
- The **floor** is what any program would have to do, on the same disk in the same round: read the bytes of the tensors
  that are needed (`dd`; no moments), then write as many bytes as the output has (`cp` of a file). Where the values do
  not change, a copy is both, and the floor is `cp`.
- shardmerge syncs its result to the disk before it publishes it; the peers and a plain `cp` do not. So `shardmerge` is
  compared with the synced floor, and `shardmerge --no-sync` with the floor and with the peers.
- What each wrote is compared with what shardmerge wrote, or with the input where a peer cannot rename, bit by bit.
"""

_RUNNING = """\
## Running it

| what | writes | takes about | disk |
|---|---|---:|---:|
| `make bench`: all cases, 5 rounds | a file a case, `zero2-1g.json` | 45 min | 14 GB |
| `python -m benchmarks.run --cases zero2-1g` | that one alone | 4 min | 4 GB |
| the same with `--cold`, with `--size 2GiB` | `zero2-1g-cold.json`, `zero2-2g.json` | | |
| `python -m benchmarks.sizes` | `sizes.json` | 10 min | 35 GB |
| `python -m benchmarks.full_8b` | `full-8b.json` | 10 min | 51 GB |
| `python -m benchmarks.lora` | `lora.json` | 4 min | 5 GB |
| `python -m benchmarks.memory_8b` | `memory-8b.json` | 2 to 80 min a kind | 17 GB |
| `python -m benchmarks.loops` | `loops.json` | 10 min | 3 GB |
| `python -m benchmarks.windows` | `windows.json` | 10 min | 3 GB |
| `python -m benchmarks.views` | `views.json` | 1 min | 1 GB |
| `python -m benchmarks.report` | this page and its plots | 1 s | |

DeepSpeed and mergekit get environments of their own below `.envs` (2 GB, built when missing); torch is pinned to a CPU
build. `--scratch` says where the files lie meanwhile; they are removed.
"""

_NOT_MEASURED = """\
## What is not measured

- Spinning disks and network file systems. More than two cores, and memory busy with other work.
- float8 outputs of checkpoints, torch `.pth` sources, several output shards, `--download`.
- Older DeepSpeed, `ds_to_universal`, XTuner's own `pth_to_hf`.
- Energy.
"""


def write(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Writes the pages and their plots, and removes plots of results that are gone."""
    wanted = files(results)
    for path in _left_over(wanted, docs):
        path.unlink()
    for name, text in wanted.items():
        (docs / name).parent.mkdir(exist_ok=True)
        (docs / name).write_text(text, "utf-8")


def outdated(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Returns the files that `write` would change, add or remove."""
    wanted = files(results)
    changed = [docs / name for name, text in wanted.items() if not _holds(docs / name, text)]
    return changed + _left_over(wanted, docs)


def files(results: Path) -> dict[str, str]:
    """Returns the pages and the plots, by their path below docs."""
    found = read(results)
    plots = {f"{PLOTS}/{name}": text for name, text in _plots(found)}
    return {ANSWERS: "\n".join(answers(found, PAGE)), PAGE: "\n".join(_page(found)), **plots}


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text("utf-8") == text


def _left_over(wanted: Mapping[str, str], docs: Path) -> list[Path]:
    return [path for path in sorted((docs / PLOTS).glob("*.svg")) if f"{PLOTS}/{path.name}" not in wanted]


def _plots(found: Mapping[str, Result]) -> Iterator[tuple[str, str]]:
    if HEADLINE in found:
        yield "headline.svg", picture(found[HEADLINE])
    for stem, result in cases(found).items():
        yield from case_plots(stem, result).items()
    for stem, result in found.items():
        for plot in result.get("plots", ()):
            lines = [Line(series["label"], series["points"]) for series in plot["series"]]
            text = curves(plot["title"], tuple(plot["axes"]), lines, doubling=plot.get("doubling", False))
            yield f"{stem}-{plot['key']}.svg", text


def _page(found: Mapping[str, Result]) -> Iterator[str]:
    measured = cases(found)
    yield _HEAD
    yield from _machines(found)
    reached = list(goals.rows(found))
    if reached:
        yield "## What was to be shown\n"
        yield from table(["case", "bar", "measured", ""], reached, words=4)
    if measured:
        yield "## All cases\n"
        yield "Medians of ratios: shardmerge over the floor, and the fastest peer over `shardmerge --no-sync`.\n"
        yield from summary(measured)
    for stem, result in measured.items():
        yield from case_page(stem, result)
    for stem, result in found.items():
        yield from _free(stem, result)
    yield from other_pages(found)
    yield _RUNNING
    yield _NOT_MEASURED


def _machines(found: Mapping[str, Result]) -> Iterator[str]:
    cards: dict[str, list[str]] = {}
    for stem, machine in machines(found):
        cards.setdefault(_card(machine), []).append(f"`{stem}`")
    for card, stems in cards.items():
        yield f"Machine of {', '.join(dict.fromkeys(stems))}: {card}\n"


def _card(machine: Mapping[str, Any]) -> str:
    first = ("cpu", "cores", "memory_gib", "kernel", "file_system", "python", "note")
    # How results of schema 1 call what runs in the environment of DeepSpeed.
    others = {name: text for name, text in machine.items() if name not in first and not name.startswith("deepspeed_")}
    hardware = (
        f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {machine.get('memory_gib', '?')} GiB, "
        f"Linux {machine.get('kernel', '?')}, {machine.get('file_system', '?')}; Python {machine.get('python', '?')}"
    )
    versions = "".join(f", {name} {text}" for name, text in others.items())
    return f"{hardware}{versions}." + (f" {machine['note']}" if machine.get("note") else "")


def _free(stem: str, result: Result) -> Iterator[str]:
    """What a result file says of itself."""
    tables, plots = result.get("tables", ()), result.get("plots", ())
    if not (tables or plots):
        return
    yield f"## {result.get('title', stem)}\n"
    if result.get("about"):
        yield f"{result['about']}\n"
    yield origin(stem, result)
    for plot in plots:
        yield f"![{plot['title']}]({PLOTS}/{stem}-{plot['key']}.svg)\n"
    for entry in tables:
        if entry.get("title"):
            yield f"### {entry['title']}\n"
        if entry.get("about"):
            yield f"{entry['about']}\n"
        yield from table(entry["columns"], entry["rows"], words=entry.get("words", 1))


if __name__ == "__main__":
    write()
