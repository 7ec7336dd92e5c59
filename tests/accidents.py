"""Where the tests of accidents play: fixtures that they share, each module with a machine and a scene of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import tool
from tests.killing import Machine, machine
from tests.scene import Scene


@pytest.fixture(scope="module")
def accidents() -> Iterator[Path]:
    """In memory, where there is such a place: what is killed loses nothing that it wrote, so no disk is needed."""
    memory = "/dev/shm"
    found = Path(tempfile.mkdtemp(prefix="shardmerge-accidents-", dir=memory if os.access(memory, os.W_OK) else None))
    yield found
    shutil.rmtree(found)


@pytest.fixture(scope="module")
def runs(accidents: Path) -> Iterator[Machine]:
    """Runs commands that are killed, cut off, or take turns."""
    with machine(accidents, tool("gcc")) as found:
        yield found


@pytest.fixture(scope="module")
def scene(accidents: Path, runs: Machine) -> Scene:
    """A mapping and what its runs are to give."""
    return Scene.set(accidents / "scene", runs)
