"""What the page says of the run: how it went over time, and what was checked. A page made later knows none of it."""

from __future__ import annotations

from datetime import datetime, timezone

from shardmerge.plan.tables import human_bytes
from shardmerge.reports.chart import FEWEST_POINTS, chart_svg
from shardmerge.reports.markup import escaped
from shardmerge.reports.run import Run
from shardmerge.reports.sections import NARROW, WIDE

_LATER = (
    '<section aria-labelledby="course"><h2 id="course">The run</h2>'
    "<p>This page was made from the receipt after the run. A receipt holds no times: equal runs have equal receipts. "
    "<code>shardmerge run --report</code> adds throughput and memory over time.</p></section>"
)


def course(run: Run | None) -> str:
    """Returns how the run went."""
    if run is None:
        return _LATER
    began = datetime.fromtimestamp(run.began, timezone.utc)
    moved = ((run.cloned, "cloned"), (run.read, "read"), (run.written, "written"))
    facts = [
        f"Started {began:%Y-%m-%d %H:%M} UTC",
        ", ".join(f"{human_bytes(nbytes)} {word}" for nbytes, word in moved if nbytes),
        f"{run.workers} workers" + (f" in {run.processes} processes" if run.processes > 1 else ""),
    ]
    if run.kept:
        facts.append(f"{human_bytes(run.kept)} of the result had been made by an earlier run")
    checks = "".join(f"<li>{escaped(check)}</li>" for check in run.checks)
    return (
        '<section aria-labelledby="course"><h2 id="course">The run</h2>'
        f"<p>{escaped('. '.join(fact for fact in facts if fact))}.</p>{_pictures(run)}"
        f"{f'<ul>{checks}</ul>' if checks else ''}</section>"
    )


def _pictures(run: Run) -> str:
    if len(run.points) < FEWEST_POINTS:
        return "<p>The run was too short to draw throughput and memory over time.</p>"
    pictures = "\n".join(chart_svg(run, width, kind) for width, kind in ((WIDE, "wide"), (NARROW, "narrow")))
    return (
        f'{pictures}<p class="readout" id="readout">{len(run.points)} samples. '
        "Memory is that of all processes of the run on one machine; pages that they share count once.</p>"
    )
