"""No error of reading or writing is lost: the run fails, and nothing is published."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardmerge
from shardmerge.errors import CheckpointError, OutputError, ResourceError
from shardmerge.publish import having_made
from shardmerge.storage import cache, reading, writing
from shardmerge.storage.reading import SourceFile
from tests.faults import thin_volume, tool
from tests.killing import FAIL, SKIP, Machine, Trap
from tests.scene import WAYS, Scene
from tests.staged import assert_well_left, files

MIB = 1 << 20


# A volume that has less behind it than it says, and gets more in time.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MiB: more than `Trail` keeps behind the cursor, and more than is behind the volume."""
    return _saved(tmp_path_factory.mktemp("large"), 24, 4)


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 MiB: `Trail` keeps all of it until the end."""
    return _saved(tmp_path_factory.mktemp("brief"), 12, 1)


def _saved(folder: Path, count: int, mib: int) -> Path:
    random = np.random.default_rng(0)
    save_file({f"w{i}": random.integers(0, 255, mib * MIB, np.uint8) for i in range(count)}, folder / "m.safetensors")
    return folder / "m.safetensors"


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "plain"])
@pytest.mark.parametrize(("source", "behind", "given"), [("large", 30, 80), ("brief", 4, 12)], ids=["large", "brief"])
def test_an_error_of_writing_that_passes_ends_the_run(  # of what, on what, and when it passes
    source: str, behind: int, given: int, bounded: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Waiting for a range takes the error from the descriptor: the sync at the end would know nothing of it."""
    monkeypatch.setattr(having_made, "bounds_cache", lambda moved: bounded)
    real, written = writing.OutputFile.write, 0

    with thin_volume(behind * MIB) as volume:

        def write(self: writing.OutputFile, offset: int, data: memoryview) -> None:
            nonlocal written
            if not written:
                os.sync()  # names and tables are on the disk: what fails is data
            real(self, offset, data)
            written += data.nbytes
            if written >= given * MIB:
                volume.give_room(self.path)

        monkeypatch.setattr(writing.OutputFile, "write", write)
        path, options = request.getfixturevalue(source), shardmerge.Options(workers=1)
        with pytest.raises((ResourceError, OutputError)) as caught:
            shardmerge.convert(path, volume.root / "out", options=options)
        assert caught.value.code in ("disk-full", "unwritable-output")
        assert [path.name for path in volume.root.iterdir()] == ["lost+found"]


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "plain"])
def test_a_volume_that_stays_full_ends_the_run(large: Path, bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(having_made, "bounds_cache", lambda moved: bounded)
    with thin_volume(30 * MIB) as volume:
        with pytest.raises((ResourceError, OutputError)):
            shardmerge.convert(large, volume.root / "out")
        assert not (volume.root / "out").exists()


def test_what_failed_once_is_never_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread met the error, and whatever became of it there."""
    file = writing.OutputFile(tmp_path / "file", 16)
    real, full = os.pwrite, iter([True])

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if next(full, False):
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResourceError):
        file.write(8, memoryview(b"12345678"))
    with pytest.raises(ResourceError):
        file.seal(b"abcdefgh")
    assert (tmp_path / "file").read_bytes() == bytes(16)


@pytest.mark.parametrize("size", [12, 20])
def test_what_has_another_size_is_never_sealed(tmp_path: Path, size: int) -> None:
    """Somebody else cut it off, or wrote behind its end: what was synced is not what was written."""
    file = writing.OutputFile(tmp_path / "file", 16)
    file.write(8, memoryview(b"12345678"))
    os.truncate(tmp_path / "file", size)
    with pytest.raises(OutputError):
        file.seal(b"abcdefgh")
    file.abandon()


def test_what_is_closed_twice_closes_nothing_else(tmp_path: Path) -> None:
    """The number of its descriptor is somebody else's by then."""
    written = writing.OutputFile(tmp_path / "file", 8)
    written.seal(b"abcdefgh")
    read = SourceFile(tmp_path / "file")
    read.close()
    for file, close in ((written, written.abandon), (read, read.close)):
        other = os.open(file.path, os.O_RDONLY)
        close()
        assert os.read(other, 8) == b"abcdefgh"
        os.close(other)


@contextmanager
def _no_file_larger(most: int) -> Iterator[None]:
    """As `ulimit -f`, and what a file system takes: EFBIG, and a signal that Python ignores."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_be_so_large_is_a_full_disk_and_closed(tmp_path: Path) -> None:
    before = len(_descriptors())
    with _no_file_larger(MIB), pytest.raises(ResourceError) as caught:
        writing.OutputFile(tmp_path / "file", 2 * MIB)
    assert caught.value.code == "disk-full"
    assert len(_descriptors()) == before


def _descriptors() -> list[str]:
    return [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]


def _fails(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_part_that_fails_is_closed(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever called goes on living, and what was deleted would go on taking its room."""
    monkeypatch.setattr(writing, "start_writing", _fails)
    with pytest.raises(OutputError) as caught:
        shardmerge.convert(small, tmp_path / "out")
    assert caught.value.code == "unwritable-output"
    assert not [path for path in _descriptors() if path.startswith(str(tmp_path))]


def test_a_system_without_the_call_writes_all_the_same(tmp_path: Path) -> None:
    """A pipe cannot be waited for (ESPIPE): a hint that is not taken. A closed descriptor is an error."""
    read, write = os.pipe()
    cache.start_writing(write, 0, 1)
    cache.drop_written(write, 0, 1)
    os.close(read)
    os.close(write)
    with pytest.raises(OSError, match="Bad file descriptor"):
        cache.start_writing(write, 0, 1)


# Short counts.


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:most], offset))
    writing.write_small(tmp_path / "file", [b"0123456789", b"", b"abcdefgh"])
    assert (tmp_path / "file").read_bytes() == b"0123456789abcdefgh"


@pytest.mark.parametrize("most", [1, 3, 7])
def test_the_first_bytes_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The length of a safetensors header, written last: half of it is another length."""
    file = writing.OutputFile(tmp_path / "file", 16)
    file.write(8, memoryview(b"12345678"))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:most], offset))
    file.seal(b"abcdefgh")
    assert (tmp_path / "file").read_bytes() == b"abcdefgh12345678"


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_short_read_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Of one range, and of many at a time."""
    (tmp_path / "file").write_bytes(b"0123456789abcdefgh")
    outs = [memoryview(bytearray(9)), memoryview(bytearray(8))]
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: real(fd, [into[0][:most]], offset))
    with SourceFile(tmp_path / "file") as file:
        assert file.read(2, 12) == b"23456789abcd"
        file.read_runs([0, 10], outs)
    assert [bytes(out) for out in outs] == [b"012345678", b"abcdefgh"]


@pytest.mark.parametrize("most", [1, 3, 7])
def test_what_was_written_is_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    file = writing.OutputFile(tmp_path / "file", 24, read_back=True)
    file.write(8, memoryview(b"0123456789abcdef"))
    real, out = os.preadv, memoryview(bytearray(12))
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: real(fd, [into[0][:most]], offset))
    file.read_back(10, out)
    assert bytes(out) == b"23456789abcd"
    os.truncate(tmp_path / "file", 12)
    with pytest.raises(OutputError, match="ends before what was written"):
        file.read_back(10, out)
    file.abandon()


def test_a_file_that_ends_before_it_did_is_truncated(tmp_path: Path) -> None:
    """It had its size when it was opened. Of one range, of many at a time, of a window."""
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    out = memoryview(bytearray(1 << 20))
    with SourceFile(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", 5000)
        for read in (lambda: file.read_into(0, out), lambda: file.read_runs([0], [out]), lambda: file.window(0, 9000)):
            with pytest.raises(CheckpointError) as caught:
                read()
            assert caught.value.code == "truncated-file"


def test_an_error_of_reading_many_ranges_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    monkeypatch.setattr(os, "preadv", _fails)
    with SourceFile(tmp_path / "file") as file, pytest.raises(CheckpointError) as caught:
        file.read_runs([7], [memoryview(bytearray(3))])
    assert (caught.value.code, caught.value.where) == ("unreadable-file", f"{tmp_path / 'file'}, byte 7")


def test_a_file_that_shrinks_while_it_is_mapped_is_an_error_not_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Python compared the sizes: the pages are asked for before anybody touches one."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))

    class Shrinking(mmap.mmap):
        def __init__(self, *given: object, **named: object) -> None:
            os.truncate(path, 4096)

    monkeypatch.setattr(mmap, "mmap", Shrinking)
    with SourceFile(path) as file, pytest.raises(CheckpointError) as caught:
        file.window(5000, 9000)
    assert caught.value.code == "truncated-file"


def test_a_kernel_that_cannot_ask_for_pages_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.14: EINVAL, as for any advice that does not exist. What was read is there, whatever comes."""
    (tmp_path / "file").write_bytes(b"x" * (1 << 20))
    monkeypatch.setattr(reading, "_MADV_POPULATE_READ", 9999)
    with SourceFile(tmp_path / "file") as file:
        found = file.window(5000, 9000)
        assert not isinstance(found.obj, mmap.mmap)
        os.truncate(tmp_path / "file", 0)
        assert bytes(found) == b"x" * 9000


def test_a_write_that_gets_nowhere_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(OutputError):
        writing.write_small(tmp_path / "file", b"0123456789")


# Every call that can fail, failing.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_file({"a": np.arange(1000, dtype=np.float32), "b": np.ones((3, 5), np.float32)}, folder / "model.safetensors")
    (folder / "generation_config.json").write_text('{"max_length": 20}')
    return folder


def _fault(fault: str) -> list[str]:
    return ["-e", f"trace={fault.split(':', 1)[0]}", "-e", f"inject={fault}"]


def _traced(folder: Path, out: Path, *options: str) -> tuple[int, str, str]:
    """Runs a conversion under strace; returns the exit code, what it said, and the log."""
    log = out.with_name("trace")
    command = [tool("strace"), "-f", "-o", str(log), *options]
    command += [sys.executable, "-m", "shardmerge", "convert", str(folder), str(out), "--workers", "1"]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # else it makes directories, and renames files, as we do
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if "ptrace" in done.stderr:
        pytest.skip(f"tracing is not allowed here: {done.stderr.strip()}")
    return done.returncode, done.stderr, log.read_text()


def test_each_call_that_fails_ends_the_run(scene: Scene, runs: Machine) -> None:
    """The output path is as it was, and what is left beside is good to go on with; or the result is there whole."""
    plain = WAYS["plain"]
    scene.begin(plain)
    assert scene.run(runs, plain).code == 0
    calls = list(runs.calls)
    assert {call.name for call in calls} == {
        "open", "pwrite", "sync_file_range", "ftruncate", "fsync", "rename", "mkdir", "utimens", "unlink", "rmdir"
    }  # fmt: skip
    commit = next(n for n, call in enumerate(calls) if call.name == "rename" and call.b == str(scene.out))
    for n, call in enumerate(calls):
        scene.begin(plain)
        ran = scene.run(runs, plain, Trap(FAIL, at=n + 1, number=errno.ENOSPC if n % 2 else errno.EIO))
        assert runs.hit
        assert "Traceback" not in ran.err
        if (n > commit and call.name in ("unlink", "rmdir")) or call.result == -errno.EEXIST:
            assert ran.code == 0, ran.err  # tried again; or it is there
        elif n > commit:
            assert ran.code == 6, ran.err
            assert scene.seen(plain) == "new"
        else:
            assert ran.code == (4 if n % 2 else 1), (call, ran.err)
            assert ran.json()["errors"][0]["code"] == ("disk-full" if n % 2 else "unwritable-output")
            assert_well_left(scene.out)
        assert scene.run(runs, plain).code == 0
        scene.published(plain)


# Calls that the system, or the file system, does not have.


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_calls_that_are_not_there_are_done_without(scene: Scene, runs: Machine, number: int) -> None:
    """An old kernel, a file system, and a filter of system calls in a container each say so by another number."""
    way = replace(WAYS["no-exchange"], no_exchange=number)
    scene.begin(way)
    ran = scene.run(runs, way, Trap(FAIL, at=1, until=10_000, only="sync_file_range", number=number))
    assert runs.hit
    assert ran.code == 0, ran.err
    scene.published(way)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_directory(scene: Scene, runs: Machine, number: int) -> None:
    plain = WAYS["plain"]
    scene.begin(plain)
    assert scene.run(runs, plain).code == 0
    syncs = [n for n, call in enumerate(runs.calls, 1) if call.name == "fsync" and not call.a.endswith(".tmp")]
    assert len(syncs) > 10
    for at in syncs:
        scene.begin(plain)
        ran = scene.run(runs, plain, Trap(FAIL, at=at, number=number))
        assert ran.code == 0, ran.err
        scene.published(plain)


def test_a_rename_that_says_it_was_done_and_was_not(scene: Scene, runs: Machine) -> None:
    """Of whatever goes with the parts: what is missing is missed before anything is published."""
    plain = WAYS["plain"]
    scene.begin(plain)
    assert scene.run(runs, plain).code == 0
    beside = [
        n for n, call in enumerate(runs.calls, 1) if call.name == "rename" and "/ready-" in call.b.rsplit("/", 1)[0]
    ]
    assert len(beside) > 5
    for at in beside:
        scene.begin(plain)
        ran = scene.run(runs, plain, Trap(SKIP, at=at))
        # The other one: its temporary name is needed again, by a file of the same name in another folder.
        assert ran.json()["errors"][0]["code"] in ("part-differs", "output-exists")
        assert scene.seen(plain) == ""
        assert scene.run(runs, plain).json()["parts_made"] == 0
        scene.published(plain)


def test_a_thread_that_fails_ends_the_others(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each after what it is at: a full disk is not written to for hours."""
    real, written = writing.OutputFile.write, count()

    def write(self: writing.OutputFile, offset: int, data: memoryview) -> None:
        time.sleep(0.02)
        (_fails if next(written) == 5 else real)(self, offset, data)

    monkeypatch.setattr(writing.OutputFile, "write", write)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        shardmerge.convert(large, tmp_path / "out", options=shardmerge.Options(workers=4, memory=64 * MIB))
    assert next(written) < 6 + 2 * 4


@pytest.fixture(scope="module")
def undisturbed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shardmerge.convert(small, out)
    return files(out)


# As NFS does, which says "disk full" there.
_CLOSING = r"""
import errno, os, re, sys
from pathlib import Path
from shardmerge.cli.main import main
real, wanted = os.close, sys.argv.pop(1)
def close(fd):
    name = Path(f"/proc/self/fd/{fd}").resolve().name
    real(fd)
    if re.fullmatch(wanted + r"\.\w+\.\d+\.tmp", name):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
os.close = close
main()
"""


@pytest.mark.parametrize("name", ["begun.json", "00000", "00000.json", "generation_config.json", "shardmerge.json"])
def test_an_error_of_closing_ends_the_run(
    tmp_path: Path, small: Path, undisturbed: dict[str, bytes], name: str
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", _CLOSING, name, "convert", str(small), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "[disk-full]" in done.stderr
    assert_well_left(out)
    shardmerge.convert(small, out)
    assert files(out) == undisturbed


@pytest.mark.parametrize(
    "fault",
    [f"{call}:retval={most}:when={n}" for call in ("pwrite64", "preadv2") for most in (1, 5) for n in (1, 2, 3)]
    + [f"{call}:error=ENOSYS" for call in ("sync_file_range", "fadvise64", "ioctl")],
)
def test_short_counts_and_missing_calls_change_no_byte(tmp_path: Path, small: Path, fault: str) -> None:
    code, said, log = _traced(small, tmp_path / "out", *_fault(fault))
    assert "INJECTED" in log or fault.startswith("fadvise64")
    assert code == 0, said
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", small))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    shardmerge.verify(tmp_path / "out")


def test_an_error_of_reading_names_the_file(tmp_path: Path, small: Path) -> None:
    source = small / "model.safetensors"
    code, said, log = _traced(small, tmp_path / "out", "-P", str(source), *_fault("preadv2:error=EIO:when=2+"))
    assert "INJECTED" in log
    assert code == 1
    assert f"{source}, byte" in said
    assert not (tmp_path / "out").exists()
