"""``shardmerge bench``: its figures add up, it leaves nothing behind, and what measures does measure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from shardmerge.bench import suite
from shardmerge.bench.checkpoint import write_checkpoint
from shardmerge.bench.processes import measure, thinned
from shardmerge.errors import ResourceError
from tests.conftest import shardmerge

MIB = 1 << 20
SIZE = 40 * MIB  # two layers of 16 MiB and 4 KiB
BYTES = 2 * (16 * MIB + 4096)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def found(scratch: Path) -> dict[str, object]:
    done = shardmerge("bench", "--size", "40MiB", "--rounds", "2", "--scratch", scratch, "--json")
    assert "round 2 of 2" in done.stderr
    return json.loads(done.stdout)


def test_bytes_are_those_of_the_jobs(found: dict[str, object]) -> None:
    assert found["size"] == BYTES
    jobs = {job["key"]: (job["bytes_read"], job["bytes_written"]) for job in found["jobs"]}
    assert jobs == {"cast": (BYTES, BYTES // 2), "rename": (BYTES, BYTES)}


def test_every_job_has_ours_and_the_floor_and_figures_that_add_up(found: dict[str, object]) -> None:
    for job in found["jobs"]:
        contenders = {contender["key"]: contender for contender in job["contenders"]}
        assert set(contenders) == {"shardmerge", "shardmerge-no-sync", "floor", "floor-sync"}
        for contender in contenders.values():
            wall = contender["wall"]
            assert 0 < wall["min"] <= wall["median"] <= wall["max"]
            # Two roundings lie between: of the seconds, and of the quotient.
            assert contender["gb_per_s"] == pytest.approx(
                job["bytes_written"] / wall["median"] / 1e9, rel=0.01, abs=1e-3
            )
            assert 0 <= contender["anonymous"] <= contender["peak"]
            # A dd of 30 MB may end before the first look, after 20 ms.
            assert contender["anonymous"] or contender["key"].startswith("floor")
        assert contenders["floor"]["to_floor"] == {"median": 1, "min": 1, "max": 1}
        assert contenders["shardmerge"]["to_floor"]["min"] > 0


def test_the_scratch_directory_is_as_it_was(found: dict[str, object], scratch: Path) -> None:
    assert found["jobs"]
    assert list(scratch.iterdir()) == []


def test_the_table_shows_every_contender(scratch: Path) -> None:
    done = shardmerge("bench", "--size", "17MiB", "--rounds", "1", "--scratch", scratch)
    for words in ("fp32 to bf16", "rename only", "shardmerge --no-sync", "floor: copy, synced", "warm"):
        assert words in done.stdout


def test_the_reference_reader_reads_the_checkpoint(tmp_path: Path) -> None:
    assert write_checkpoint(tmp_path, SIZE) == BYTES
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == BYTES
    assert all(0.015 < tensor.std() < 0.025 for tensor in tensors.values())


# ---- refused before anything is written


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--size", "1MiB"], 2, "bad-size"),
        (["--size", "1000000TiB"], 4, "disk-too-small"),
        (["--scratch", "no/such/place"], 2, "missing-path"),
        (["--rounds", "0"], 2, "--rounds"),
    ],
)
def test_refusals(options: list[str], code: int, says: str, tmp_path: Path) -> None:
    assert says in shardmerge("bench", "--scratch", tmp_path, *options, code=code).stderr
    assert list(tmp_path.iterdir()) == []


def test_the_disk_must_hold_the_checkpoint_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "free_bytes", lambda path: 2 * SIZE)
    with pytest.raises(ResourceError, match="does not have room"):
        suite.bench(SIZE, tmp_path, 1, print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_neither_files_nor_processes(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardmerge", "bench", "--size", "64MiB", "--rounds", "99", "--scratch", tmp_path]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "wrote a checkpoint" in process.stderr.readline()
    while not any(str(tmp_path) in line for line in processes() if "launcher.py" in line):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 5, said
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []
    assert not [line for line in processes() if str(tmp_path) in line]


def processes() -> list[str]:
    """Returns the command line of every process that still has one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return [line for line in found if line]


def test_a_contender_that_fails_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = suite.Contender("floor", "floor", False, False, lambda out: ["sh", "-c", "echo no luck >&2; exit 3"])
    monkeypatch.setattr(suite, "_jobs", lambda source, n: (suite.Job("cast", "cast", n, n, (broken,)),))
    with pytest.raises(suite.RefusedError) as caught:
        suite.bench(SIZE, tmp_path, 1, print)
    assert (caught.value.code, caught.value.found) == ("bench-failed", "no luck")
    assert list(tmp_path.iterdir()) == []


# ---- what measures


def test_memory_of_children_and_bytes_moved_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    grow = "data = bytearray(b'x') * (64 << 20); import time; time.sleep(0.3)"
    done = measure(["sh", "-c", f'head -c 5000000 /dev/zero > {file}; "{sys.executable}" -I -S -c "{grow}"; true'])
    assert done.code == 0, done.stderr
    assert done.anonymous >= 64 * MIB
    assert done.peak >= 64 * MIB
    if done.io:  # hidden from those who are not allowed to look
        assert done.io["wchar"] >= 5_000_000
        assert done.io["rchar"] >= 5_000_000


def test_pages_of_mapped_files_are_told_from_anonymous_ones(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(48 * MIB))
    look = "import mmap, time; f = open('file', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)"
    touch = "sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.3)"
    done = measure([sys.executable, "-I", "-S", "-c", f"{look}; {touch}"], cwd=tmp_path)
    assert done.mapped >= 48 * MIB > done.anonymous


def test_the_memory_of_the_caller_is_not_counted() -> None:
    ballast = bytearray(os.urandom(1 << 20)) * 200
    assert measure(["true"]).peak < 50 * MIB < len(ballast)


def test_a_thinned_curve_keeps_the_highest_point() -> None:
    curve = [(i / 50, i % 977, 3 * i % 131) for i in range(5000)]
    thin = thinned(curve)
    assert len(thin) <= 200
    assert max(a + b for _, a, b in thin) == max(a + b for _, a, b in curve)
    assert thinned(curve[:3]) == curve[:3]
