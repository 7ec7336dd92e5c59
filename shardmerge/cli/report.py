"""The command that writes a report, and what a run needs to write its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardmerge.cli.options import PATH, dumped, json_option, refuse_idle
from shardmerge.errors import PublishedError, ShardmergeError, UsageError

if TYPE_CHECKING:
    from shardmerge.api import Prepared, Result
    from shardmerge.cli.progress import Advance
    from shardmerge.reports.timeline import Timeline


def _html(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuses the argument that follows ``--report`` where it was not meant to be its file."""
    del context, parameter
    if value and not value.endswith(".html"):
        raise UsageError(
            "bad-report-path",
            "--report takes a file that ends in .html, or nothing",
            found=value,
            hint=f"put --report last, or name the file: --report={Path(value).name}.html",
        )
    return value


report_option = click.option(
    "--report",
    "report_file",
    is_flag=False,
    flag_value="",
    default=None,
    callback=_html,
    metavar="[FILE.html]",
    help="Write a report of the run: an HTML file. Default: OUT.report.html, beside the result.",
)


@click.command()
@click.argument("directory", type=PATH)
@click.option("-o", "--out", type=PATH, metavar="FILE", help="Default: DIRECTORY.report.html, beside it.")
@json_option
def report(directory: str, out: str | None, as_json: bool) -> None:
    """Write a report of a published DIRECTORY: one HTML file that says where every byte is from.

    It is made of the receipt; `run --report` adds how the run went over time.
    """
    from shardmerge import api

    path = api.report(directory, out)
    click.echo(dumped({"path": str(path)}) if as_json else f"written: {path}")


def asked_report(given: dict[str, Any]) -> RunReport | None:
    """Returns the report that ``--report`` asks for; the time of the run begins."""
    return None if given["report_file"] is None else RunReport(given["report_file"])


def refuse_report(given: dict[str, Any], why: str) -> None:
    """Refuses ``--report`` where there is no run that it could be of."""
    refuse_idle({"report": given["report_file"] is not None}, "report", why=why)


class RunReport:
    """The report of a run that is about to begin.

    Parameters
    ----------
    given
        The file that was asked for; ``""`` for the default one.
    """

    def __init__(self, given: str) -> None:
        from shardmerge.reports.timeline import Timeline

        self._given = given
        self._timeline: Timeline = Timeline()
        self._path = Path()

    def begin(self, prepared: Prepared, out: Path) -> None:
        """Ends planning, and refuses a path that no report can have, before anything is written."""
        from shardmerge import api

        self._path = api.report_path(out, self._given or None)
        self._timeline.planned(prepared.plan.tensor_bytes)

    def watching(self, progress: Advance | None) -> Advance:
        """Returns what is to be told of bytes, which tells what was told before."""

        def advance(nbytes: int) -> None:
            self._timeline.advance(nbytes)
            if progress is not None:
                progress(nbytes)

        return advance

    def write(self, result: Result, prepared: Prepared) -> Path:
        """Writes the report of a result that was published; returns its path.

        Raises
        ------
        PublishedError
            ``report-not-written``.
        """
        from shardmerge import api

        try:
            return api.report(result.path, self._path, api.reported_run(self._timeline, result, prepared))
        except ShardmergeError as error:
            raise PublishedError(
                "report-not-written",
                "the result is published and whole, but its report could not be written",
                where=error.where,
                found=error.what,
                hint=f"write it elsewhere: shardmerge report {result.path} --out report.html",
            ) from error
