"""What the fuzzer begins with, and whatever it found, again. ``python -m tests.fuzz`` looks for more; see there."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from docs import reliability_summary
from tests.fuzz.targets import TARGETS

RESULTS = Path(__file__).with_name("soak") / "fuzz.json"
FOUND = Path(__file__).with_name("fuzz") / "found"


def found(name):
    """The inputs that once ended in an error that the reader does not document."""
    return [path.read_bytes() for path in sorted((FOUND / name).glob("*"))]


@pytest.mark.parametrize("name", TARGETS)
def test_readers_raise_what_they_document(name):
    target = TARGETS[name]
    seeds = [data for data in target.seeds() if len(data) <= target.most]
    assert len(seeds) >= 3
    accepted = 0
    for data in (*seeds, *found(name)):
        with suppress(*target.allowed):
            target.read(data)
            accepted += 1
    assert accepted, "no seed reaches the end of the reader"


def test_the_results_are_those_of_these_targets():
    rows = json.loads(RESULTS.read_text("utf-8"))["targets"]
    assert len(rows) >= 10
    assert set(rows) <= set(TARGETS)
    assert not [name for name, row in rows.items() if row["findings"]]


def test_a_finding_is_counted_at_the_head_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"executions": 3, "findings": {"slow": "1.3 s", "KeyError at x": "KeyError at x"}}
    monkeypatch.setattr(reliability_summary, "_SECTIONS", {"Fuzzing": reliability_summary._SECTIONS["Fuzzing"]})
    monkeypatch.setattr(reliability_summary, "read", lambda name: {"targets": {"pickle": one}})
    assert reliability_summary.summary()[-1] == "| [Fuzzing](#fuzzing) | 3 inputs | 2 |"
