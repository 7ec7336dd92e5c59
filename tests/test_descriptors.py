"""An interrupt loses no open file, wherever it comes.

``KeyboardInterrupt`` is raised before every single step of Python (an opcode) of what opens files, one run for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shardmerge.storage import cloning, descriptors, reading, writing
from tests.day.api_process import descriptors as open_files
from tests.interrupts import SOURCES, Steps, conversion, interrupts, stepped

Work = Callable[[Path], object]


def read(folder: Path) -> None:
    with reading.SourceFile(folder / "small") as file:
        file.read(0, 4)


def read_pooled(folder: Path) -> None:
    pool = reading.FilePool()
    pool.get(str(folder / "small")).read(0, 4)
    pool.close()


def read_again(folder: Path) -> None:
    """As after an error of a network file system."""
    with reading.SourceFile(folder / "small") as file:
        file._reopen()


def write(folder: Path) -> None:
    (folder / "new").unlink(missing_ok=True)
    file = writing.OutputFile(folder / "new", 16, sync=False)
    file.write(8, memoryview(b"abcdefgh"))
    file.seal(b"12345678")


def write_small(folder: Path) -> None:
    (folder / "new").unlink(missing_ok=True)
    writing.write_small(folder / "new", b"abc", sync=False)


def sync(folder: Path) -> None:
    writing.sync_file(folder / "small")
    writing.sync_directory(folder)


def clone(folder: Path) -> None:
    cloning.can_clone(folder / "small", 0, 4096, folder)


def pipe(folder: Path) -> None:
    read, write = descriptors.pipe()
    os.write(write.fileno(), b"a")
    assert os.read(read.fileno(), 1) == b"a"
    write.close()
    assert os.read(read.fileno(), 1) == b""


def interrupted(work: Work, folder: Path, step: int, where: str) -> bool:
    """Tells whether the work came to the step."""
    return stepped(lambda: work(folder), Steps(where, step)) != ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small").write_bytes(bytes(8192))
    return tmp_path


@pytest.mark.parametrize(
    "work", [read, read_pooled, read_again, write, write_small, sync, clone, pipe], ids=lambda work: work.__name__
)
def test_an_interrupt_at_any_step_leaves_nothing_open(work: Work, folder: Path) -> None:
    work(folder)
    before = open_files()
    step = 0
    while interrupted(work, folder, step, "/shardmerge/storage/"):
        assert open_files() == before, step
        step += 1
    assert step > 20


def test_what_nobody_holds_any_more_is_closed(folder: Path) -> None:
    before = open_files()
    file = writing.OutputFile(folder / "new", 16, sync=False)
    assert open_files() != before
    del file
    assert open_files() == before


def test_what_is_closed_has_no_number(folder: Path) -> None:
    """A number that were used once more could be another file's by then."""
    file = descriptors.opened(folder / "small", os.O_RDONLY)
    assert os.get_inheritable(file.fileno()) is False
    file.close()
    file.close()
    assert file.fileno() == -1


def test_an_error_of_the_close_is_told_once(folder: Path) -> None:
    file = descriptors.opened(folder / "small", os.O_RDONLY)
    os.close(file.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.close()
    assert file.fileno() == -1


@pytest.mark.parametrize("source", SOURCES)
def test_an_interrupted_conversion_leaves_nothing_open(source: str, tmp_path: Path) -> None:
    """``python -m tests.interrupts`` does the same a thousand times."""
    scene = conversion(source, tmp_path / "place")
    for step, what in interrupts(scene, 8, seed=7):
        assert not what.startswith("wrong"), (step, what)
