"""The page: a template that ships here, filled with what the sections say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from string import Template

from shardmerge.plan.tables import human_bytes
from shardmerge.reports.markup import escaped, json_block
from shardmerge.reports.provenance import Provenance
from shardmerge.reports.run import Run
from shardmerge.reports.sections import counts, flow, kinds, summary, unused, warnings
from shardmerge.reports.sections_of_files import digests, files, sources
from shardmerge.reports.sections_of_run import course
from shardmerge.reports.tensor_table import MOST_ROWS, rules, tensors

# How a report is known again: it stands among the first lines.
MARK = '<meta name="generator" content="shardmerge report">'

_HERE = Path(__file__).parent


def page(found: Provenance, run: Run | None = None) -> str:
    """Returns the report as HTML that needs no other file; the same receipt and run give the same text."""
    lead = (
        f"<code>{escaped(found.target)}</code>: {counts(len(found.tensors), 'tensor')}, "
        f"{escaped(human_bytes(found.nbytes))} in {counts(len(found.shards), 'file')} "
        f"from {counts(len(found.sources), 'source')}."
    )
    footer = (
        f"Made by shardmerge {escaped(found.version)} from the receipt <code>shardmerge.json</code>. "
        "The files themselves were not read: <code>shardmerge verify</code> compares them with the receipt."
    )
    return Template(_text("page.html")).substitute(
        title=escaped(f"{found.name}: shardmerge report"),
        style=_text("page.css"),
        name=escaped(found.name),
        lead=lead,
        body="\n".join(_sections(found, run)),
        footer=footer,
        data=json_block(_data(found, run)),
        script=_text("page.js"),
    )


def _sections(found: Provenance, run: Run | None) -> Iterator[str]:
    yield warnings(found)
    yield summary(found, run)
    yield flow(found)
    yield kinds(found)
    yield course(run)
    yield sources(found)
    yield tensors(found)
    yield unused(found)
    yield rules(found)
    yield files(found)
    yield digests(found)


def _data(found: Provenance, run: Run | None) -> dict[str, object]:
    """What the script needs, and a reader of tickets may want."""
    points = [[point.seconds, point.done, point.resident] for point in run.points] if run else []
    return {
        "plan": found.plan,
        "patterns": len(found.tensors) > MOST_ROWS,
        "points": points,
        "kept": run.kept if run else 0,
    }


def _text(name: str) -> str:
    return (_HERE / name).read_text("utf-8").rstrip("\n")
