"""Every malformed file of the corpus is refused, or comes to nothing, in little time and memory, and runs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest

from shardmerge.errors import LONGEST_LINE
from tests.attacks.corpus import cases

RESULTS = Path(__file__).parents[1] / "soak" / "corpus.json"
# Of the processor: the time on the wall is that of what else the machine does.
SECONDS, MEBIBYTES = 2, 256
BUG = 70


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the commands of each case did; two processes, each with every second case."""
    root = tmp_path_factory.mktemp("corpus")
    written = [(case, case.written(root)) for case in cases()]
    halves = [written[start::2] for start in range(2)]
    with ThreadPoolExecutor(2) as both:
        told = both.map(lambda half: _outcomes([commands for _, commands in half], root), halves)
        pairs = [pair for half, said in zip(halves, told, strict=True) for pair in zip(half, said, strict=True)]
    return [(case, outcome) for (case, _), outcome in pairs]


def _outcomes(half: list[list[list[str]]], root: Path) -> list[dict[str, object]]:
    asked = {"cases": half, "allowed": [str(root)]}
    command = [sys.executable, "-m", "tests.attacks.contained"]
    done = subprocess.run(command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _odd(found, wrong):
    return [f"{case.kind}, {case.name}: {outcome}" for case, outcome in found if wrong(outcome)]


def test_the_corpus_is_of_every_kind(found):
    kinds = Counter(case.kind for case, _ in found)
    assert len(found) >= 600
    assert set(kinds) == {"pickle", "zip", "legacy", "header", "index", ".metadata", "JSON", "YAML", "no file"}
    assert min(kinds.values()) >= 40


def test_no_file_is_a_bug_or_ends_the_process(found):
    assert not _odd(found, lambda outcome: BUG in outcome["codes"] or min(outcome["codes"]) < 0)


def test_no_file_runs_or_writes_anything(found):
    assert not _odd(found, lambda outcome: outcome["events"])


def test_no_file_steers_the_terminal(found):
    """What is said is lines of printable characters, none of them endless, and no line that a file wrote."""
    assert not _odd(found, lambda outcome: any(map(_is_steering, outcome["said"].split("\n"))))


def _is_steering(line):
    return not line.isprintable() or len(line) > LONGEST_LINE + 100 or line.startswith("error: forged")


def test_no_file_takes_much(found):
    assert not _odd(found, lambda outcome: outcome["seconds"] > SECONDS or outcome["mebibytes"] > MEBIBYTES)


def test_the_results_are_those_of_the_page(found):
    """``UPDATE_RESULTS=1`` writes them anew."""
    counts = {kind: {"files": 0, "refused": 0, "read": 0} for kind, _ in Counter(c.kind for c, _ in found).items()}
    for case, outcome in found:
        row = counts[case.kind]
        row["files"] += 1
        row["refused" if outcome["codes"][-1] else "read"] += 1
    if os.environ.get("UPDATE_RESULTS"):
        peak = max(outcome["mebibytes"] for _, outcome in found)
        longest = max(outcome["seconds"] for _, outcome in found)
        today = datetime.now(tz=timezone.utc).date().isoformat()
        measured = {"date": today, "seconds_longest": round(longest, 2), "mebibytes_most": round(peak), "kinds": counts}
        RESULTS.write_text(json.dumps(measured, indent=2) + "\n", "utf-8")
    assert json.loads(RESULTS.read_text("utf-8"))["kinds"] == counts
