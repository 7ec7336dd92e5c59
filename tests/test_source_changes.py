"""A source that changes in the middle of a run, at any call: a sample of ``python -m tests.source_changes``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import source_changes
from tests.killing import Machine
from tests.mutations import MUTATIONS
from tests.source_changes import Group, Stage, groups


@pytest.fixture(scope="module")
def stage(accidents: Path, runs: Machine) -> Iterator[Stage]:
    accidents.chmod(0o755)  # for a user who is not root
    folder = accidents / "changes"
    folder.mkdir()
    return Stage(folder, "safetensors", runs)


def test_a_change_at_some_moments(stage: Stage) -> None:
    """Of each kind one group, at three moments."""
    for number, kind in enumerate(MUTATIONS):
        there = [group for group in groups() if (group.source, group.kind) == ("safetensors", kind)]
        group = there[number % len(there)]
        found, wrong = source_changes.changed(stage, group, 3)
        assert wrong == []
        assert found.total() >= 3


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_file_that_shrinks_under_its_map_ends_no_run_by_a_signal(stage: Stage, name: str) -> None:
    """Between the moment in which a map is populated and that in which it is read; of a cast, and of a copy."""
    found, wrong = source_changes.changed(stage, Group("safetensors", name, "run", "mmap", "truncated"), 1)
    assert wrong == []
    assert found["refused: source-changed"] >= 1
