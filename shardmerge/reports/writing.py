"""Where a report goes, and how it gets there."""

from __future__ import annotations

from pathlib import Path

from shardmerge.errors import OutputError, UsageError
from shardmerge.reports.page import MARK, page
from shardmerge.reports.provenance import read_provenance
from shardmerge.reports.run import Run
from shardmerge.storage.writing import write_lines

SUFFIX = ".html"
# A report is known by its first bytes.
_HEAD = 512


def report_path(folder: Path, given: str | Path | None) -> Path:
    """Returns where the report of a directory goes: beside it, unless another path is given.

    Raises
    ------
    UsageError
        ``bad-report-path``: it does not end in ``.html``. ``missing-path``: no such directory.
    OutputError
        ``output-exists``: what is there is no report.
    """
    path = Path(given).expanduser().absolute() if given else folder.with_name(f"{folder.name}.report{SUFFIX}")
    if path.suffix != SUFFIX:
        raise UsageError(
            "bad-report-path",
            "a report is a file that ends in .html",
            found=str(given),
            hint=f"name it {path.name}{SUFFIX}",
        )
    if not path.parent.is_dir():
        hint = f"make it first: mkdir -p {path.parent}"
        raise UsageError("missing-path", "there is no such directory for the report", where=str(path.parent), hint=hint)
    if path.exists() and not _is_report(path):
        what = "there is something at this path, and it is no report"
        raise OutputError("output-exists", what, where=str(path), hint="write the report to another file")
    return path


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(_HEAD)


def write_report(folder: Path, path: Path, run: Run | None = None) -> None:
    """Writes the report of a published directory, in the place of an earlier one.

    Raises
    ------
    UsageError, VerificationError
        As ``provenance.read_provenance``.
    ResourceError, OutputError
        It cannot be written.
    """
    write_lines(path, [page(read_provenance(folder), run), "\n"])
