"""Reports that have no place."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from tests.following import Call, Given, Row, by_hand
from tests.hint_rows.given import CONVERT, copied, mapped, without
from tests.test_mistakes import GQA, REST


def published(*args: str) -> Given:
    """A result, and a call."""

    def given(call: Call) -> Sequence[str]:
        shutil.copytree(call.world["gqa"], call.folder / "ck")
        call.args = [*CONVERT, "ck", "out"]
        assert call.attempt() == ()
        (call.folder / "notes.html").write_text("<p>mine</p>")
        return args

    return given


def last(call: Call) -> None:
    assert "put --report last" in call.hint
    call.args.remove("--report")
    call.args.append("--report")


def elsewhere(call: Call) -> None:
    """Runs the command of the hint, which stands at its end."""
    call.args = call.hint.rpartition("shardmerge ")[2].split()


ROWS = [
    Row(
        "a report before the mapping",
        mapped(GQA + REST, "run", "--report", "mapping.yaml", "-q"),
        "bad-report-path",
        last,
    ),
    Row(
        "a report that is no HTML",
        published("report", "out", "--out", "report.pdf"),
        "bad-report-path",
        lambda call: call.change("report.pdf", call.hint.removeprefix("name it ")),
    ),
    Row(
        "a report in no directory",
        published("report", "out", "--out", "reports/model.html"),
        "missing-path",
        by_hand("mkdir -p", lambda call: (call.folder / "reports").mkdir()),
    ),
    Row(
        "a report over another file",
        published("report", "out", "--out", "notes.html"),
        "output-exists",
        by_hand("another file", lambda call: call.change("notes.html", "other.html")),
    ),
    Row(
        "a report where no file can be",
        copied("gqa", "--report=/proc/self/report.html"),
        "report-not-written",
        elsewhere,
    ),
    Row(
        "a report of a share",
        mapped(GQA + REST, "run", "mapping.yaml", "--part", "any", "--report"),
        "no-effect",
        without("--report"),
    ),
    Row("a report of a plan", copied("gqa", "--dry-run", "--report"), "no-effect", without("--report")),
]
