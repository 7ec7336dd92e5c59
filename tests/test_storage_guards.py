"""The guards of reading and writing, one at a time: what each prevents happens, and must have no effect."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from shardmerge import api, system_errors
from shardmerge.errors import (
    CheckpointError,
    InterruptedRunError,
    OutputError,
    ResourceError,
    UnreadableError,
    UsageError,
)
from shardmerge.execute.patience import Halt, patiently
from shardmerge.execute.pins import Pins
from shardmerge.execute.records import _Spans
from shardmerge.storage import cache, limits, reading, writing
from shardmerge.storage.exchanging import exchange
from shardmerge.storage.listing import files_below, matching
from shardmerge.storage.reading import FilePool, SourceFile


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes what is synced and renamed, in order: ``fsync`` by the name that it has by then."""
    noted: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(fd: int) -> None:
        noted.append(f"fsync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        sync(fd)

    def renamed(self: Path, target: Path) -> Path:
        noted.append(f"rename {self.name} {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    return noted


# --- writing ---


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "plan").write_text("the old one")
    writing.write_lines(tmp_path / "plan", ["a\n", "b\n"])
    temporary = f"plan.{os.getpid()}.tmp"
    assert calls == [f"fsync {temporary}", f"rename {temporary} plan"]
    assert (tmp_path / "plan").read_text() == "a\nb\n"


def test_a_text_that_fails_leaves_the_old_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan").write_text("the old one")
    monkeypatch.setattr(os, "fsync", _raises(errno.EIO))
    with pytest.raises(OutputError) as raised:
        writing.write_lines(tmp_path / "plan", ["a\n"])
    assert raised.value.where == str(tmp_path / "plan")
    assert "another output path" in raised.value.hint
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"plan": "the old one"}


def test_a_file_of_somebody_else_is_synced(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "file").touch()
    writing.sync_file(tmp_path / "file")
    writing.sync_directory(tmp_path)
    assert calls == ["fsync file", f"fsync {tmp_path.name}"]


def test_the_names_above_are_synced_as_far_up_as_this_user_may(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path.parent and access(path, mode))
    writing.sync_above(tmp_path / "a/b/c")
    assert calls == ["fsync b", "fsync a", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_directory_that_cannot_be_synced_is_none(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _raises(number))
    writing.sync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        writing.sync_file(tmp_path / "file")


@pytest.mark.parametrize("sync", [True, False])
def test_what_is_synced_of_a_file(sync: bool, tmp_path: Path, calls: list[str]) -> None:
    """The data, then the first bytes that make the file one: two syncs, or none."""
    file = writing.OutputFile(tmp_path / "file", 16, sync=sync)
    file.write(8, memoryview(b"12345678"))
    assert (tmp_path / "file").read_bytes() == bytes(8) + b"12345678"
    file.seal(b"abcdefgh")
    writing.write_small(tmp_path / "small", b"text", sync=sync)
    assert calls == (["fsync file", "fsync file", "fsync small"] if sync else [])
    assert (tmp_path / "file").read_bytes() == b"abcdefgh12345678"
    assert file.fileno() == -1
    file.close()  # nothing any more


@pytest.mark.parametrize(
    "make", [lambda path: writing.OutputFile(path, 8), lambda path: writing.write_small(path, b"")]
)
def test_a_file_that_is_there_is_not_written_to(make: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"theirs")
    with pytest.raises(OutputError) as raised:
        make(tmp_path / "file")
    assert raised.value.code == "output-exists"
    assert raised.value.where == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"theirs"


def test_what_nobody_asks_for_is_synced(tmp_path: Path, calls: list[str]) -> None:
    writing.OutputFile(tmp_path / "file", 8).seal(b"abcdefgh")
    writing.write_small(tmp_path / "small", b"text")
    assert calls == ["fsync file", "fsync file", "fsync small"]


def test_what_was_read_back_leaves_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not what was only written: it is needed once more."""
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(writing, "drop_written", lambda fd, offset, nbytes: dropped.append((offset, nbytes)))
    file = writing.OutputFile(tmp_path / "file", 24, sync=False, bounded=True, read_back=True)
    file.write(8, memoryview(b"0123456789abcdef"))
    file.read_back(10, memoryview(bytearray(6)))
    file.seal(b"abcdefgh")
    assert dropped == [(10, 6)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_an_error_of_writing_says_what_to_do(number: int, tmp_path: Path) -> None:
    with pytest.raises((OutputError, ResourceError)) as raised, writing.explained(tmp_path):
        raise OSError(number, os.strerror(number))
    assert raised.value.hint
    assert raised.value.where == str(tmp_path)


WANTED = reading._WANTED_FILES
LIMITS = {
    "raised to what is wanted": ((1024, 1 << 20), WANTED, WANTED - 128),
    "raised as far as may be": ((1024, 4096), 4096, 4096 - 128),
    "without a hard limit": ((1024, resource.RLIM_INFINITY), WANTED, WANTED - 128),
    "without any": ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, WANTED),
    "more than wanted": ((1 << 19, 1 << 20), None, WANTED - 128),
    "just as many": ((WANTED, 1 << 20), None, WANTED - 128),
    "few": ((100, 100), None, 16),
}


@pytest.mark.parametrize("what", LIMITS)
def test_how_many_files_a_pool_may_hold_open(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (soft, hard), raised, expected = LIMITS[what]
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: given.append(limits))
    assert reading.most_open_files() == expected
    assert given == ([] if raised is None else [(raised, hard)])


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_limit_that_may_not_be_raised_stays(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: int, limits: tuple[int, int]) -> None:
        raise error

    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert reading.most_open_files() == 1024 - 128


def test_many_parts_of_a_small_file_are_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_AT_ONCE", 10)
    parts = [bytes([n]) * n for n in range(30)]
    writing.write_small(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert all(len(part) >= 10 for part in list(writing._gathered(parts))[:-1])
    assert len(list(writing._gathered(parts))) > 20


@pytest.mark.parametrize(("number", "raised"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)])
def test_an_error_of_beginning_to_write_is_raised(
    number: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be told here and nowhere else; a system that does not have the call tells nothing."""
    import ctypes

    def call(*given: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(cache, "_sync_file_range", lambda: call)
    with (tmp_path / "file").open("wb") as file:
        for work in (cache.start_writing, cache.drop_written):
            if not raised:
                work(file.fileno(), 0, 1)
                continue
            with pytest.raises(OSError) as caught:  # noqa: PT011  # the number follows
                work(file.fileno(), 0, 1)
            assert caught.value.errno == number


def test_a_library_without_the_call_writes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    monkeypatch.setattr(ctypes, "CDLL", _raises(errno.ENOENT))
    assert cache._sync_file_range.__wrapped__() is None
    assert not exchange(tmp_path / "a", tmp_path / "b")
    limits.return_freed_memory()


def test_the_error_of_the_call_is_the_one_that_is_raised() -> None:
    """A pipe has nothing to write out, which is no error; a number that is no descriptor is one."""
    for fd in os.pipe():
        cache.start_writing(fd, 0, 1)
        os.close(fd)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        cache.start_writing(fd, 0, 1)


def test_what_cannot_be_exchanged_is_told(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not exchange(tmp_path / "a", tmp_path / "a" / "b")  # EINVAL, as of a file system that cannot
    assert (tmp_path / "a" / "b").is_dir()


def test_two_names_change_places(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("first")
    second.mkdir()
    assert exchange(first, second)
    assert (first.is_dir(), second.read_text()) == (True, "first")
    with pytest.raises(FileNotFoundError) as raised:
        exchange(first, tmp_path / "none")
    assert (raised.value.filename, raised.value.filename2) == (str(first), str(tmp_path / "none"))


def test_the_room_of_a_path_that_is_not_there_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    found = writing.free_bytes(tmp_path / "a" / "b" / "c")
    assert abs(found - status.f_bavail * status.f_frsize) < 1 << 30  # others write to this disk


# --- reading ---


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "device"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path(os.devnull)
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    with pytest.raises(CheckpointError) as raised:
        SourceFile(path)
    assert raised.value.code == ("unreadable-file" if kind == "socket" else "not-a-file")
    assert raised.value.where == str(path)


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    assert reading.read_whole(tmp_path / "file") == b"12345678"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError) as raised:
        SourceFile(tmp_path / "none")
    assert (raised.value.code, raised.value.where) == ("missing-file", str(tmp_path / "none"))


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 9), (8, 1), (9, 0), (4, -1)])
def test_no_byte_outside_of_a_file_is_read(offset: int, nbytes: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    with SourceFile(tmp_path / "file") as file:
        assert file.read(0, 8) == b"12345678"
        assert file.read(8, 0) == b""
        with pytest.raises(CheckpointError) as raised:
            file.read(offset, nbytes)
    assert raised.value.code == "truncated-file"
    assert raised.value.where == f"{tmp_path / 'file'}, byte {offset}"
    assert raised.value.hint


@pytest.mark.parametrize("replaced", [False, True])
def test_another_file_is_not_read_on_after_an_error(
    replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is opened again after an error that may pass; another file under it is not the one that was opened."""
    monkeypatch.setattr(system_errors, "WAITS", (0.0, 0.0))
    path, real, failing = tmp_path / "file", os.preadv, [errno.EIO]
    path.write_bytes(b"12345678")

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if failing:
            raise OSError(failing.pop(), "once")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with SourceFile(path) as file:
        if replaced:
            path.rename(tmp_path / "old")
            path.write_bytes(b"........")
        assert file.read(0, 8) == b"12345678"


@pytest.mark.parametrize(("number", "attempts"), [(errno.EIO, 1 + 3), (errno.EBADF, 1)])
def test_what_does_not_pass_is_tried_four_times(
    number: int, attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(system_errors, "WAITS", (0.0, 0.0))
    (tmp_path / "file").write_bytes(b"12345678")
    tried = []

    def preadv(*given: object) -> int:
        tried.append(given)
        raise OSError(number, "always")

    with SourceFile(tmp_path / "file") as file:
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(CheckpointError) as raised:
            file.read(4, 2)
    assert len(tried) == attempts
    assert len(caplog.messages) == attempts - 1
    assert raised.value.code == "unreadable-file"
    assert raised.value.where == f"{tmp_path / 'file'}, byte 4"
    assert raised.value.hint


def test_a_pool_holds_so_many_files_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used last stays open; counts are of what was read."""
    monkeypatch.setattr(reading, "most_open_files", lambda: 16)
    paths = [tmp_path / str(n) for n in range(18)]
    for path in paths:
        path.write_bytes(b"12345678")
    pool, out = FilePool(), memoryview(bytearray(4))
    for path in paths[:16]:
        pool.read_into(str(path), 4, out)
    assert (pool.opens, pool.reads, pool.bytes_read) == (16, 16, 64)
    first = pool.get(str(paths[0]))  # used again
    pool.get(str(paths[16]))
    assert pool.get(str(paths[0])) is first
    assert pool.opens == 17
    pool.get(str(paths[1]))  # the oldest: it had to go
    assert (pool.opens, pool.reads, pool.bytes_read) == (18, 16, 64)
    pool.close()
    assert first.fileno() == -1


def test_a_file_that_whoever_looks_at_it_refuses_is_closed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    pool, seen = FilePool(), []

    def refuse(file: SourceFile) -> None:
        seen.append(file)
        raise UsageError("bad-part", "no")

    pool.opened = refuse
    for _ in range(2):
        with pytest.raises(UsageError):
            pool.get(str(tmp_path / "file"))
    assert [file.fileno() for file in seen] == [-1, -1]
    assert pool.opens == 0


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").touch()
    assert matching(tmp_path, "*.txt") == [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert matching(tmp_path / "none", "*") == matching(tmp_path / "a.txt", "*") == matching(Path("\0"), "*") == []
    assert {path.name for path in files_below(tmp_path)} == {"a.txt", "b.txt", "d.txt"}
    assert list(files_below(tmp_path / "none")) == []
    monkeypatch.setattr(os, "listdir", _raises(errno.EACCES))
    monkeypatch.setattr(os, "scandir", _raises(errno.EACCES))
    with pytest.raises(PermissionError):
        matching(tmp_path, "*")
    with pytest.raises(PermissionError):
        list(files_below(tmp_path))


def test_pages_leave_the_cache_where_they_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LAG", 7)
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, nbytes, advice: dropped.append((start, nbytes, advice)))
    (tmp_path / "file").write_bytes(b"12345678")
    for bounded in (False, True):
        pool = FilePool(bounded=bounded)
        for offset in (0, 4):
            pool.read_into(str(tmp_path / "file"), offset, memoryview(bytearray(4)))
    assert dropped == [(0, 4, os.POSIX_FADV_DONTNEED)]


def test_what_is_mapped_and_what_is_read(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 1 << 20
    path.write_bytes(bytes(range(256)) * (size // 256) + b"end")
    mapping, reading_only = FilePool("mmap"), FilePool()
    assert reading_only.window(str(path), 3, size) is None
    assert mapping.window(str(path), 3, size - 1) is None
    found = mapping.window(str(path), 3, size)
    assert found is not None
    assert found.readonly
    assert found == reading_only.view(str(path), 3, size) == path.read_bytes()[3:]
    assert not reading_only.view(str(path), 3, size).readonly
    assert (mapping.reads, mapping.bytes_read) == (1, size)


def test_a_file_that_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", _raises(errno.EACCES))
        with pytest.raises(CheckpointError) as raised:
            SourceFile(tmp_path / "file")
    assert (raised.value.code, raised.value.where) == ("unreadable-file", str(tmp_path / "file"))
    assert raised.value.hint


def test_how_much_memory_is_used_unless_somebody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cgroup_limit", lambda: None)
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    monkeypatch.delenv("SLURM_MEM_PER_CPU", raising=False)
    assert limits.default_budget(1) == limits.default_budget(8) == 256 << 20
    assert limits.default_budget(9) == 288 << 20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert limits.default_budget(9) == 100 << 20
    monkeypatch.setattr(limits, "cgroup_limit", lambda: 99 << 20)
    assert limits.default_budget(9) == 99 << 20


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_plan_that_was_written_down_knows_sizes_and_times(change: str, tmp_path: Path) -> None:
    """It knows nothing else of a file that it has not looked at yet: inodes and their times do not travel."""
    path = tmp_path / "model.safetensors"
    save_file({"w": np.ones(4, np.float32)}, path)
    (stamp,) = api.inspect(path).files
    stamp = replace(stamp, inode=0, header_nbytes=0)
    Pins([stamp]).check()
    if change == "size":
        with path.open("ab") as file:
            file.write(b"x")
        os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))
    else:
        os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns + 1))
    with pytest.raises(CheckpointError) as raised:
        Pins([stamp]).check()
    assert (raised.value.code, raised.value.where) == ("source-changed", str(path))
    with SourceFile(path) as file, pytest.raises(CheckpointError):
        Pins([stamp]).opened(file)


@pytest.mark.parametrize(("kib", "checked"), [(900, 1), (1400, 0)])
def test_a_record_is_compared_unless_much_of_it_is_not_needed(kib: int, checked: int, tmp_path: Path) -> None:
    """200 KiB of it are needed; what is read beside them is a MiB at most."""
    torch.save({"w": torch.arange(kib << 8, dtype=torch.float32)[: 200 << 8]}, tmp_path / "model.pth")
    found = api.convert(tmp_path / "model.pth", tmp_path / "out").records
    assert found is not None
    assert (found.checked, found.partly) == (checked, 1 - checked)


def test_many_ranges_of_a_record_are_kept_apart() -> None:
    spans = _Spans()
    for n in range(300):
        spans.add(2 * n, 2 * n + 1, 0)
    assert (spans.covered(), len(spans.rows())) == (300, 300)
    assert spans.missing(0, 600) == [(2 * n + 1, 2 * n + 2) for n in range(300)]


# --- stopping ---


def test_nothing_is_done_after_a_stop() -> None:
    halt = Halt()
    with halt.done_or_not():
        pass
    halt.check()
    halt.ask()
    assert halt()
    with pytest.raises(InterruptedRunError), halt.done_or_not():
        pytest.fail("it was stopped")
    with pytest.raises(InterruptedRunError):
        halt.check()


def test_a_stop_waits_for_what_must_be_whole() -> None:
    halt, done = Halt(), []
    begun = threading.Event()

    def work() -> None:
        with halt.done_or_not():
            begun.set()
            time.sleep(0.1)
            done.append(halt())

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    halt.ask()
    done.append(halt())
    thread.join()
    assert done == [False, True]


@pytest.mark.parametrize("last", [True, False])
def test_work_that_comes_to_its_end_after_a_stop_counts_if_it_was_the_last(last: bool) -> None:
    def look() -> None:
        raise KeyboardInterrupt

    def work(halt: Halt) -> str:
        while not halt():
            time.sleep(0.01)
        return "done"

    if last:
        assert patiently(work, look, last=True) == "done"
        return
    with pytest.raises(InterruptedRunError):
        patiently(work, look)


def _raises(number: int) -> Callable[..., None]:
    def call(*given: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    return call
