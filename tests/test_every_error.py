"""Errors of the system at any call: what they come to. A sample; ``make soak`` tries all."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import shardmerge
from shardmerge import api, system_errors
from shardmerge.cli.failing import _as_ours
from shardmerge.errors import CheckpointError, InterruptedRunError, OutputError, ResourceError, ShardmergeError
from shardmerge.execute import patience
from shardmerge.execute.worker import Worker
from shardmerge.publish import running
from shardmerge.publish.finishing import Goal
from shardmerge.publish.staging import Staging, left_over
from shardmerge.sources.opening import open_catalog
from shardmerge.storage.listing import files_below, matching, without_links
from shardmerge.storage.reading import SourceFile
from tests.conftest import GOLDEN
from tests.error_ways import FIXTURES, WAYS
from tests.every_error import trying
from tests.killing import Machine

_SOURCES = {name: GOLDEN / paths[0] for name, paths in FIXTURES.items()}
# Of how many faults one is tried, where a way is not one of the plain ones.
_SELDOM = 997


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_errors, "WAITS", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("way", WAYS)
def test_a_sample_of_all_errors_at_all_calls(way: str, accidents: Path, runs: Machine) -> None:
    base = accidents / way
    base.mkdir()
    *_, found = trying(way, base, runs, every=199 if way in FIXTURES else _SELDOM)
    assert found.wrong == []
    assert found.tried > 0
    if way in FIXTURES:
        outcomes = Counter(outcome for _, _, _, outcome in found.outcomes)
        assert outcomes["exit 0"]
        assert any(outcome.startswith("exit 4") for outcome in outcomes)


def test_what_others_left_is_not_worth_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for once the result is published: an error there would deny what is true."""
    (tmp_path / "out.partial-other").mkdir()
    assert len(left_over(tmp_path / "out", "0" * 64)) == 1

    def refused(folder: object) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(os, "listdir", refused)
    assert left_over(tmp_path / "out", "0" * 64) == ()


@pytest.mark.parametrize("name", ["begun.json", "parts/00001.json"])
def test_who_comes_last_publishes_or_says_why_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 without a result would be believed: nobody comes after the last."""
    source = tmp_path / "in.safetensors"
    save_file({f"t{number}": np.zeros(300_000, np.float32) for number in range(3)}, source)
    mapping = tmp_path / "m.yaml"
    mapping.write_text(
        "shardmerge: 1\nsources: {a: in.safetensors}\noutput: {path: out, shard_size: 1300KB}\n"
        "tensors: {'{x...}': 'a:{x...}'}\n"
    )
    options = shardmerge.Options(sync=False, workers=1)
    for task in range(2):
        api.run_part(mapping, f"{task}/3", options=options)
    read = Path.read_bytes

    def failing(self: Path) -> bytes:
        if self.as_posix().endswith(name):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # as of a call that knows no name
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match=f"Too many open files.*{name}"):
        api.run_part(mapping, "2/3", options=options)
    monkeypatch.undo()
    api.run_part(mapping, "2/3", options=options)
    shardmerge.verify(tmp_path / "out")


def test_a_part_that_is_lost_before_it_is_published_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process took the model, and a part of it was lost on the way back."""
    source = tmp_path / "in.safetensors"
    save_file({f"t{number}": np.zeros(300_000, np.float32) for number in range(3)}, source)
    finish, lost = running.finish, []

    def robbed(goal: Goal, staging: Staging, *given: Any, **more: Any) -> object:
        if not lost:
            lost.append(sorted(staging.model.iterdir())[1])
            lost[0].unlink()
        return finish(goal, staging, *given, **more)

    monkeypatch.setattr(running, "finish", robbed)
    result = shardmerge.convert(source, tmp_path / "out", shard_size="1300KB", sync=False, workers=1)
    assert result.made == 4
    shardmerge.verify(tmp_path / "out")


def test_a_source_that_cannot_be_looked_at_is_not_missing(tmp_path: Path) -> None:
    """A circle of links; what is not there is another error."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CheckpointError) as caught:
        open_catalog(tmp_path / "a")
    assert (caught.value.code, caught.value.exit_code) == ("unreadable-file", 1)
    assert caught.value.hint


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
        shardmerge.convert(_SOURCES["safetensors"], tmp_path / "out")
    assert failing.left == 8


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync", "statvfs"])
def test_a_call_that_is_interrupted_is_made_again(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Python itself repeats some of them, and not others; none of them ends a run."""
    _Failing(monkeypatch, call, errno.EINTR, 2)
    shardmerge.convert(_SOURCES["safetensors"], tmp_path / "out")
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
    shutil.copytree(_SOURCES[fixture], source)
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
        shardmerge.convert(_SOURCES["safetensors"], tmp_path / ("n" * 231))
    assert "may have 230 bytes" in system_errors.advice(caught.value)
    assert not list(tmp_path.iterdir())
    shardmerge.convert(_SOURCES["safetensors"], tmp_path / ("n" * 230))


def test_a_latest_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    shutil.copytree(_SOURCES["ZeRO-3"], tmp_path / "in")
    os.truncate(tmp_path / "in" / "latest", 1 << 40)
    with pytest.raises(ShardmergeError):
        open_catalog(tmp_path / "in")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EINTR])
def test_an_error_that_passes_after_publishing_is_none(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the sync of the directory, and of looking for what is to be removed."""
    out, real, failed = tmp_path / "out", {name: getattr(os, name) for name in ("fsync", "listdir")}, set()

    def once(name: str, *given: object) -> object:
        if (out / "shardmerge.json").exists() and name not in failed:
            failed.add(name)
            raise OSError(number, os.strerror(number))
        return real[name](*given)

    for name in real:
        monkeypatch.setattr(os, name, partial(once, name))
    shardmerge.convert(_SOURCES["safetensors"], out)
    assert failed == {"fsync", "listdir"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_receipt_that_cannot_be_read_once_is_no_missing_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = Path.read_bytes, []

    def once(path: Path) -> bytes:
        if path.name == "00000.json" and len(failed) < 2:
            failed.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", once)
    shardmerge.convert(_SOURCES["safetensors"], tmp_path / "out")
    assert len(failed) == 2


def test_what_somebody_left_to_be_published_and_cannot_be_taken_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a wait for somebody who is gone, which has no end."""
    out, rename = tmp_path / "out", Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name.startswith("ready-"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ShardmergeError):
        shardmerge.convert(_SOURCES["safetensors"], out)  # which leaves it there
    assert list(tmp_path.glob("out.partial-*/ready-*"))
    with pytest.raises(OutputError, match="Permission denied") as caught:
        shardmerge.convert(_SOURCES["safetensors"], out)
    assert "/ready-" in caught.value.where


def test_a_circle_of_links_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for call in (lambda: without_links(tmp_path / "a"), lambda: shardmerge.run(tmp_path / "a" / "mapping.yaml")):
        with pytest.raises((OSError, ShardmergeError)):
            call()


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENODEV, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["__init__", "madvise"])
def test_what_cannot_be_mapped_is_read(number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")

    def fails(*given: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mmap, "mmap", type("Failing", (mmap.mmap,), {call: fails}))
    with SourceFile(tmp_path / "file") as file:
        assert bytes(file.window(2, 3)) == b"234"


def test_a_thread_that_cannot_be_started_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any of them: those that there are end first, and nothing is left open."""
    real, begun = threading.Thread.start, []

    def start(refused: int, thread: threading.Thread) -> None:
        begun.append(thread)
        if len(begun) == refused:
            raise RuntimeError("can't start new thread")
        real(thread)

    carry = Worker.carry
    monkeypatch.setattr(Worker, "carry", lambda *given: time.sleep(0.05) or carry(*given))
    for refused in range(1, 6):
        begun.clear()
        monkeypatch.setattr(threading.Thread, "start", partialmethod(lambda self, n: start(n, self), refused))
        with pytest.raises(ResourceError) as caught:
            shardmerge.convert(_SOURCES["safetensors"], tmp_path / "out", options=shardmerge.Options(workers=2))
        assert caught.value.code == "not-started"
        assert [thread for thread in begun if thread.is_alive()] == []
        assert [path for path in _descriptors() if path.startswith(str(tmp_path))] == []


def test_an_error_without_a_file_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shardmerge.convert(_SOURCES["safetensors"], tmp_path / "out")
    monkeypatch.setattr(Path, "read_bytes", _breaks)
    with pytest.raises(OSError, match="Input") as caught:
        shardmerge.verify(tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out" / "shardmerge.json")


def _breaks(path: Path) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_directory_that_seems_not_writable_once_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, answers = os.access, [False]
    monkeypatch.setattr(os, "access", lambda path, mode: answers.pop() if answers else real(path, mode))
    shardmerge.convert(_SOURCES["safetensors"], tmp_path / "out")
    assert not answers


def test_no_memory_is_no_bug() -> None:
    found = _as_ours(MemoryError())
    assert (found.code, found.exit_code) == ("no-memory", 4)
