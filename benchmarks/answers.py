"""The page of answers: how fast, how much memory, beside what. The measurements behind it have a page of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks import goals
from benchmarks.case_pages import short_title
from benchmarks.headline import HEADLINE, headline
from benchmarks.markdown import MIB, table
from benchmarks.reading import DURABLE, QUICK, Result, cases, contender, floor_of, peers, ratio

_FLOOR = """\
The **floor** is the cheapest way to move the same bytes with other programs: `dd` reads the input, then `cp` writes as
many bytes as the output has. 1.00 x is the time of those two, one after the other. shardmerge reads and writes at the
same time, so it can need less: 0.40 x means 40 % of the time that reading and then copying took. *Durable* waits until
the result is on the disk, as shardmerge does by default, and so does its floor. *Peak* is the highest resident memory
of any run.
"""


def answers(found: Mapping[str, Result], details: str) -> Iterator[str]:
    """Yields the lines of the page; ``details`` is the path of the other one."""
    measured = cases(found)
    yield "# Benchmarks\n"
    yield f"Short answers. Every run, spread and machine stands in [All measurements]({details}).\n"
    if HEADLINE in measured:
        yield f"{headline(measured[HEADLINE])}\n"
        yield "![Memory over time, DeepSpeed and shardmerge](plots/headline.svg)\n"
    yield "## Beside other tools\n"
    yield "Medians. The other tools do not wait for the disk, so shardmerge does not either here (`--no-sync`).\n"
    columns = ["conversion", "other tool", "shardmerge is faster by", "and needs of its memory"]
    yield from table(columns, _beside_tools(measured), words=2)
    yield "## Beside the disk\n"
    yield _FLOOR
    columns = ["conversion", "durable / floor", "--no-sync / floor", "peak MiB"]
    yield from table(columns, [*_beside_disk(measured), *_largest(found)])
    yield from _plans(found)
    yield from _missed(found)
    yield "## Measure it yourself\n"
    yield "`shardmerge bench` measures this machine and disk. `make bench` runs all cases, beside the other tools.\n"


def _beside_tools(measured: Mapping[str, Result]) -> Iterator[list[str]]:
    """Yields a row a tool; of a job that was measured in several sizes, the largest."""
    last = {stem.rpartition("-")[0]: stem for stem, result in measured.items() if peers(result)}
    for stem in last.values():
        mine = contender(measured[stem], QUICK)
        assert mine is not None
        for peer in peers(measured[stem]):
            faster, memory = ratio(peer, mine)["median"], ratio(peer, mine, "peak")["median"]
            yield [measured[stem]["case"]["title"], short_title(peer), f"{faster:.1f} x", f"1/{memory:.0f}"]


def _beside_disk(measured: Mapping[str, Result]) -> Iterator[list[str]]:
    for result in measured.values():
        durable, quick = contender(result, DURABLE), contender(result, QUICK)
        assert durable is not None
        assert quick is not None
        over = (
            ratio(durable, floor_of(result, synced=True))["median"],
            ratio(quick, floor_of(result, synced=False))["median"],
        )
        peak = max(entry["peak"]["max"] for entry in (durable, quick)) / MIB
        yield [result["case"]["title"], *(f"{one:.2f} x" for one in over), f"{peak:.0f}"]


def _largest(found: Mapping[str, Result]) -> Iterator[list[str]]:
    if "full-8b" in found:
        over, peak = (row[2] for row in goals.rows({"full-8b": found["full-8b"]}))
        yield [found["full-8b"]["title"], over, "", peak.removesuffix(" MiB").partition(".")[0]]


def _plans(found: Mapping[str, Result]) -> Iterator[str]:
    """The largest models are planned alone: no disk here holds them."""
    runs = found.get("planning", {}).get("runs", {})
    rows = [
        [run["about"], f"{run['plan']['wall']:.1f} s", f"{run['plan']['peak'] / MIB:.0f}"]
        for run in runs.values()
        if "plan" in run
    ]
    if rows:
        yield "## Planning the largest models\n"
        yield "Headers and names are true, the data are holes.\n"
        yield from table(["", "plan", "peak MiB"], rows)


def _missed(found: Mapping[str, Result]) -> Iterator[str]:
    missed = [row[:3] for row in goals.rows(found) if "not" in row[3]]
    if missed:
        yield "## Goals that are not reached\n"
        yield from table(["case", "goal", "measured"], missed, words=3)
