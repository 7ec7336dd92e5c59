"""No error of reading or writing is lost: the run fails, and nothing is published."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardmerge
from shardmerge.errors import OutputError, ResourceError
from shardmerge.publish import running
from shardmerge.storage import cache, writing
from tests.faults import thin_volume, tool

MIB = 1 << 20


# A volume that has less behind it than it says, and gets more in time.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MiB: more than `Trail` keeps behind the cursor, and more than is behind the volume."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    random = np.random.default_rng(0)
    save_file({f"w{i}": random.integers(0, 255, 4 * MIB, np.uint8) for i in range(24)}, path)
    return path


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "plain"])
def test_an_error_of_writing_that_passes_ends_the_run(
    large: Path, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for a range takes the error from the descriptor: the sync at the end would know nothing of it."""
    monkeypatch.setattr(running, "bounds_cache", lambda moved: bounded)
    with thin_volume(30 * MIB) as volume:
        written = 0

        def progress(nbytes: int) -> None:
            nonlocal written
            if not written:
                os.sync()  # names and tables are on the disk: what fails is data
            written += nbytes
            if written >= 80 * MIB:
                volume.give_room(next(volume.root.glob("*/model.safetensors")))

        with pytest.raises((ResourceError, OutputError)) as caught:
            shardmerge.convert(large, volume.root / "out", progress=progress)
        assert caught.value.code in ("disk-full", "unwritable-output")
        assert [path.name for path in volume.root.iterdir()] == ["lost+found"]


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "plain"])
def test_a_volume_that_stays_full_ends_the_run(large: Path, bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "bounds_cache", lambda moved: bounded)
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


def _inject(folder: Path, out: Path, fault: str, path: Path | None = None) -> tuple[int, str, bool]:
    """Runs a conversion with a fault; returns the exit code, what it said, and whether the fault came to pass."""
    log = out.with_suffix(".log")
    only = ["-P", str(path)] if path else []
    calls = fault.split(":", 1)[0]
    command = [tool("strace"), "-f", "-o", str(log), *only, "-e", f"trace={calls}", "-e", f"inject={fault}"]
    command += [sys.executable, "-m", "shardmerge", "convert", str(folder), str(out), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip(f"tracing is not allowed here: {done.stderr.strip()}")
    return done.returncode, done.stderr, "INJECTED" in log.read_text()


_FAULTS = [
    *[("fsync", "EIO", n) for n in range(1, 7)],  # counted for each thread: 1 and 2 are of the shard
    *[("pwrite64", "ENOSPC", n) for n in (1, 2, 3, 4, 6)],
    ("pwrite64", "EIO", 2),
    ("sync_file_range", "EIO", 1),
    ("sync_file_range", "ENOSPC", 3),
    ("ftruncate", "EFBIG", 1),
    ("ftruncate", "EIO", 2),
    ("rename", "EIO", 1),
    ("mkdir", "ENOSPC", 2),  # 1: the folder above, which is there
]


@pytest.mark.parametrize(("call", "error", "when"), _FAULTS, ids=[f"{c}-{e}-{n}" for c, e, n in _FAULTS])
def test_a_call_that_fails_ends_the_run(tmp_path: Path, small: Path, call: str, error: str, when: int) -> None:
    code, said, happened = _inject(small, tmp_path / "out", f"{call}:error={error}:when={when}")
    assert happened
    assert code == (4 if error in ("ENOSPC", "EFBIG") else 1), said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.log"]  # neither the result nor what led to it


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "shardmerge.json"])
def test_an_error_of_closing_ends_the_run(tmp_path: Path, small: Path, name: str) -> None:
    """NFS says "disk full" there."""
    out = tmp_path / "out"
    staging = tmp_path / f"out.partial-{_plan_id(small)}"
    code, said, happened = _inject(small, out, "close:error=EDQUOT:when=1", staging / name)
    assert happened
    assert code == 4, said
    assert [path.name for path in tmp_path.iterdir()] == ["out.log"]


def _plan_id(folder: Path) -> str:
    return shardmerge.api.prepare_conversion(folder).plan.id[:16]


@pytest.mark.parametrize(
    "fault",
    [f"{call}:retval={most}:when={n}" for call in ("pwrite64", "preadv2") for most in (1, 5) for n in (1, 2, 3)]
    + [f"{call}:error=ENOSYS" for call in ("sync_file_range", "fadvise64", "ioctl")],
)
def test_short_counts_and_missing_calls_change_no_byte(tmp_path: Path, small: Path, fault: str) -> None:
    code, said, happened = _inject(small, tmp_path / "out", fault)
    assert happened or fault.startswith("fadvise64")
    assert code == 0, said
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", small))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    shardmerge.verify(tmp_path / "out")


def test_an_error_of_reading_names_the_file(tmp_path: Path, small: Path) -> None:
    source = small / "model.safetensors"
    code, said, happened = _inject(small, tmp_path / "out", "preadv2:error=EIO:when=2", source)
    assert happened
    assert code == 1
    assert f"{source}, byte" in said
    assert not (tmp_path / "out").exists()
