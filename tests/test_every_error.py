"""Errors of the system at any call: what they come to. A sample; ``make soak`` tries all."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import shardmerge
from shardmerge import system_errors
from shardmerge.errors import CheckpointError, InterruptedRunError, OutputError, ShardmergeError
from shardmerge.execute import patience
from shardmerge.sources.opening import open_catalog
from shardmerge.storage.listing import files_below, matching
from shardmerge.storage.reading import SourceFile
from tests.every_error import FIXTURES, tried


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_errors, "WAITS", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("fixture", FIXTURES)
def test_a_sample_of_all_errors_at_all_calls(fixture: str, accidents: Path) -> None:
    base = accidents / fixture
    for folder in ("machine", "scene"):
        (base / folder).mkdir(parents=True)
    found = tried(fixture, base, every=149)
    assert found.wrong == []
    assert found.calls > 300
    outcomes = Counter(outcome for _, _, outcome in found.outcomes)
    assert outcomes["exit 0"]
    assert any(outcome.startswith("exit 4") for outcome in outcomes)


class _Failing:
    """A call that fails some times, and then works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int, after: int = 0) -> None:
        self._real, self.number, self.left, self._after = getattr(os, name), number, times, after
        monkeypatch.setattr(os, name, self)

    def __call__(self, *given: object, **named: object) -> object:
        self._after -= 1
        if self.left and self._after < 0:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), "a file")
        return self._real(*given, **named)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EINTR])
def test_an_error_of_reading_that_passes_is_read_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with SourceFile(tmp_path / "file") as file:
        before = len(list(_descriptors()))
        _Failing(monkeypatch, "preadv", number, 3)
        with caplog.at_level(logging.WARNING, "shardmerge"):
            assert file.read(2, 3) == b"234"
        assert len(list(_descriptors())) == before
    assert caplog.text.count("trying again") == 3


def test_an_error_of_reading_that_stays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with SourceFile(tmp_path / "file") as file:
        failing = _Failing(monkeypatch, "preadv", errno.ESTALE, 9)
        with pytest.raises(CheckpointError) as caught:
            file.read(2, 3)
    assert caught.value.code == "unreadable-file"
    assert "mount it again" in caught.value.hint
    assert failing.left == 9 - 5


def test_a_file_that_was_replaced_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read stays the file that was opened, whatever its name means by now."""
    (tmp_path / "file").write_bytes(b"0123456789")
    with SourceFile(tmp_path / "file") as file:
        (tmp_path / "other").write_bytes(b"abcdefghij")
        (tmp_path / "other").rename(tmp_path / "file")
        _Failing(monkeypatch, "preadv", errno.ESTALE, 1)
        assert file.read(2, 3) == b"234"


def test_an_error_of_writing_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After EIO of a sync the data is gone, and a second sync would say that all is well."""
    failing = _Failing(monkeypatch, "fsync", errno.EIO, 9)
    with pytest.raises(OutputError):
        shardmerge.convert(FIXTURES["safetensors"], tmp_path / "out")
    assert failing.left == 8


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync", "statvfs"])
def test_a_call_that_is_interrupted_is_made_again(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Python itself repeats some of them, and not others; none of them ends a run."""
    _Failing(monkeypatch, call, errno.EINTR, 2)
    shardmerge.convert(FIXTURES["safetensors"], tmp_path / "out")
    shardmerge.verify(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "trying again" in caplog.text


@pytest.mark.parametrize("names", [lambda folder: matching(folder, "*.pt"), lambda folder: list(files_below(folder))])
def test_a_directory_that_cannot_be_listed_is_not_empty(
    names: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in ("listdir", "scandir"):
        _Failing(monkeypatch, call, errno.EACCES, 9)
    assert callable(names)
    with pytest.raises(PermissionError):
        names(tmp_path)


def _descriptors() -> Iterator[str]:
    for path in Path("/proc/self/fd").iterdir():
        try:
            yield str(path.readlink())
        except FileNotFoundError:  # the one that lists
            continue


@pytest.mark.parametrize("fixture", FIXTURES)
@pytest.mark.parametrize("call", ["preadv", "pwrite", "fsync", "rename", "ftruncate"])
def test_a_run_that_fails_leaves_no_file_open(
    fixture: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the blocks of what it deleted, which an open descriptor keeps; whoever called goes on living."""
    source = tmp_path / "in"
    shutil.copytree(FIXTURES[fixture], source)
    for after in (0, 4, 20, 60):
        with monkeypatch.context() as patch:
            _Failing(patch, call, errno.EDQUOT, 10_000, after=after)
            try:
                shardmerge.convert(source, tmp_path / "out")
            except (ShardmergeError, OSError):  # which holds all that it came through
                assert [path for path in _descriptors() if path.startswith(str(tmp_path / "out"))] == []
        assert [path for path in _descriptors() if path.startswith(str(tmp_path))] == []
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_is_stopped_leaves_no_file_open(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, or by an error of the caller's own progress: while sources are open and threads read them."""
    for name in "ab":
        values = {f"w{i}": np.ones((500, 1000), np.float32) for i in range(8)}
        save_file(values, tmp_path / f"{name}.safetensors")
    sources = "sources: {a: a.safetensors, b: b.safetensors}"
    rule = '{"{r...}": {op: linear, of: ["a:{r...}", "b:{r...}"]}}'
    (tmp_path / "mapping.yaml").write_text(f"shardmerge: 1\n{sources}\ntensors: {rule}\n")
    monkeypatch.setattr(patience, "_LOOK", 0.0)  # the progress is told as often as it can be

    def opened() -> list[str]:
        return [path for path in _descriptors() if path.startswith(str(tmp_path))]

    def stop(nbytes: int) -> None:
        if sum(path.endswith(".safetensors") for path in opened()) > 1:
            raise error

    with pytest.raises((InterruptedRunError, ZeroDivisionError)):  # which holds all that it came through
        shardmerge.run(tmp_path / "mapping.yaml", tmp_path / "out", progress=stop)
    assert opened() == []
    assert not (tmp_path / "out").exists()


def test_the_name_of_an_output_directory_has_a_longest(tmp_path: Path) -> None:
    """The hint of a longer one says how long."""
    with pytest.raises(OSError, match="File name too long") as caught:
        shardmerge.convert(FIXTURES["safetensors"], tmp_path / ("n" * 231))
    assert "may have 230 bytes" in system_errors.advice(caught.value)
    assert not list(tmp_path.iterdir())
    shardmerge.convert(FIXTURES["safetensors"], tmp_path / ("n" * 230))


def test_a_latest_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES["ZeRO-3"], tmp_path / "in")
    os.truncate(tmp_path / "in" / "latest", 1 << 40)
    with pytest.raises(ShardmergeError):
        open_catalog(tmp_path / "in")
