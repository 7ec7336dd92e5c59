"""How a part is made: the file gets what it is to be made with, and threads that fail or hang are accounted for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.errors import InterruptedRunError, ResourceError
from shardmerge.execute import engine
from shardmerge.execute.engine import Workshop
from shardmerge.execute.means import Means
from shardmerge.execute.pins import Pins
from shardmerge.execute.worker import Worker
from shardmerge.plan.value import Part
from shardmerge.storage.writing import OutputFile
from tests.day.api_process import descriptors


@pytest.fixture
def part(tmp_path: Path) -> Part:
    source = tmp_path / "model.safetensors"
    save_file({f"w{n}": np.full((64, 64), n, np.float32) for n in range(8)}, source)
    return api.prepare_conversion(source, options=sm.Options(dtype="float16")).plan.parts()[0]


def shop(part: Part, **means: Any) -> Workshop:
    return Workshop(Means(**{"sync": False, "tile": 4096, **means}), Pins(part.files))


@pytest.mark.parametrize("asked", ["sync", "bounded", "sha256"])
def test_a_file_is_made_with_what_is_asked_for(
    asked: str, part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def output(path: Path, size: int, **how: Any) -> OutputFile:
        given.append(how)
        return OutputFile(path, size, **how)

    monkeypatch.setattr(engine, "OutputFile", output)
    for number, yes in enumerate((False, True)):
        shop(part, **{asked: yes}).make(part, tmp_path / f"made{number}", [0])
    off, on = given
    name = {"sha256": "read_back"}.get(asked, asked)
    assert off == {"sync": False, "bounded": False, "read_back": False}
    assert on == {**off, name: True}


def test_a_thread_that_cannot_be_started_ends_the_others(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begun = engine.begin, list[threading.Thread]()

    def second_fails(thread: threading.Thread) -> None:
        if begun:
            raise ResourceError("not-started", "the system starts no thread")
        begun.append(thread)
        begin(thread)

    monkeypatch.setattr(engine, "begin", second_fails)
    with pytest.raises(ResourceError) as raised:
        shop(part, threads=3).make(part, tmp_path / "made", [0, 0, 0])
    assert raised.value.code == "not-started"
    assert not begun[0].is_alive()
    assert (tmp_path / "made").read_bytes()[:8] == bytes(8)  # never sealed


def test_the_sources_are_closed_with_the_workshop(part: Part, tmp_path: Path) -> None:
    before = descriptors()
    made = shop(part, threads=2)
    made.make(part, tmp_path / "made", [0, 0])
    assert str(tmp_path / "model.safetensors") in descriptors().values()
    made.close()
    assert descriptors() == before


def test_a_thread_that_hangs_keeps_its_files(part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends with the process."""
    monkeypatch.setattr(engine, "GRACE", 0.2)
    goes_on, carry = threading.Event(), Worker.carry

    def waits(self: Worker, *given: Any) -> bool:
        done = carry(self, *given)
        goes_on.wait(30)
        return done

    monkeypatch.setattr(Worker, "carry", waits)
    made = shop(part)
    with pytest.raises(InterruptedRunError):
        made.make(part, tmp_path / "made", [0], lambda: True)
    (thread,) = (worker.thread for worker in made._workers)
    assert thread is not None
    assert thread.daemon
    made.close()
    assert str(tmp_path / "model.safetensors") in descriptors().values()
    goes_on.set()
    thread.join(30)
    assert not thread.is_alive()
