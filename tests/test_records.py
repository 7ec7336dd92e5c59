"""A flipped bit in a source is found by the checksum that its file carries, and nothing is published."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest

import shardmerge
from shardmerge import api
from shardmerge.errors import CheckpointError
from shardmerge.execute.checksum import crc32
from shardmerge.execute.records import RecordCounts, RecordNotes, RecordTables, compare_records
from shardmerge.publish.staging import Staging
from shardmerge.storage.reading import FilePool, IoMode
from shardmerge.tensors import Record
from tests.staged import assert_nothing_done, stagings

torch = pytest.importorskip("torch", reason="torch writes the checkpoints")

GOLDEN = Path(__file__).parent / "golden"


def _records(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of the storages of a torch zip, from Python's own reader."""
    found = []
    with zipfile.ZipFile(path) as file, path.open("rb") as raw:
        for info in file.infolist():
            if "/data/" in info.filename and info.file_size:
                raw.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", raw.read(4))
                found.append((info.filename, info.header_offset + 30 + name + extra, info.file_size))
    return found


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A contiguous tensor of several tiles, a transposed one, two views that share a storage, a small one."""
    torch.manual_seed(0)
    shared = torch.randn(700, 300)
    state = {
        "large": torch.randn(3000, 700),
        "transposed": torch.randn(600, 1100).t(),
        "upper": shared[:400],
        "lower": shared[350:],
        "small": torch.randn(5),
    }
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("io", "dtype"), [("pread", None), ("mmap", "bfloat16")])
@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("record", range(4))
def test_a_flipped_bit_of_any_storage_ends_the_run(
    model: Path, record: int, place: float, dtype: str | None, io: IoMode
) -> None:
    name, offset, nbytes = _records(model)[record]
    _flip(model, offset + int(place * (nbytes - 1)))
    with pytest.raises(CheckpointError) as caught:
        shardmerge.convert(model, model.parent / "out", options=api.Options(dtype=dtype, io=io))
    assert caught.value.code == "damaged-record"
    assert caught.value.where == f"{model}, bytes {offset} to {offset + nbytes} ({name})"
    assert_nothing_done(model.parent / "out")


@pytest.mark.parametrize("record", range(4))
def test_a_sound_copy_with_the_same_times_is_converted(model: Path, record: int, tmp_path: Path) -> None:
    """`rsync -t` from where the file is sound. No part that was made of the damaged bytes is gone on with."""
    options = api.Options(shard_size=1 << 20)
    shardmerge.convert(model, tmp_path / "right", options=options)
    before = model.stat()
    _, offset, nbytes = _records(model)[record]
    for damaged in (True, False):
        _flip(model, offset + nbytes // 2)
        os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(CheckpointError, match="checksum") if damaged else nullcontext():
            shardmerge.convert(model, tmp_path / "out", options=options)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "right")
    assert stagings(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [1, 4])
def test_all_that_is_whole_is_checked(model: Path, workers: int) -> None:
    counts = shardmerge.convert(model, model.parent / "out", options=api.Options(workers=workers)).records
    records = _records(model)
    assert counts == RecordCounts(len(records), sum(nbytes for *_, nbytes in records))
    assert list(counts.unchecked()) == []


# Stages 1 to 3, with and without parts that hold little but padding.
RUNS = ["alignment_z1_w2_bf16", "specks_z2_w4_bf16", "specks_z3_w4_bf16", "subgroups_bag_z3_w3_bf16"]


@pytest.mark.parametrize("run", RUNS)
def test_a_flipped_bit_of_a_partition_ends_the_run(run: str, tmp_path: Path) -> None:
    """Each storage of the last rank in turn: what the conversion reads ends it, the optimizer's change no byte."""
    (original,) = (GOLDEN / "zero" / run / "ckpt").glob("global_step*")
    folder = shutil.copytree(original, tmp_path / original.name)
    file = sorted(folder.glob("*_optim_states.pt"))[-1]
    right = _converted(folder, tmp_path / "right")
    said = []
    for number, (_, offset, nbytes) in enumerate(_records(file)):
        _flip(file, offset + nbytes // 2)
        found = _converted(folder, tmp_path / f"out-{number}")
        assert found == right or isinstance(found, str)
        said.append(found if isinstance(found, str) else "")
        _flip(file, offset + nbytes // 2)
    assert set(said) - {"mixed-runs"} == {"", "damaged-record"}  # steps of the optimizer are compared by the plan


def _converted(folder: Path, out: Path) -> dict[str, bytes] | str:
    """Returns what comes out, or the code of the error."""
    try:
        shardmerge.convert(folder, out)
    except CheckpointError as error:
        return error.code
    return _weights(out)


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_storage_of_which_little_is_used_is_not_read_whole(tmp_path: Path) -> None:
    torch.save({"row": torch.randn(100, 4096)[3]}, tmp_path / "a.pth")
    result = shardmerge.convert(tmp_path / "a.pth", tmp_path / "out")
    assert result.records == RecordCounts(partly=1)
    assert result.outcome.bytes_read == 4096 * 4
    assert [text[:18] for text in result.records.unchecked()] == ["1 source record(s)"]


@pytest.mark.parametrize(("columns", "whole"), [(3072, True), (512, False)])
def test_what_is_read_in_runs_is_read_again_where_most_of_it_is_used(
    tmp_path: Path, columns: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some columns of a matrix: each row of them is a read of its own, too short to be summed."""
    runs: list[int] = []
    real = FilePool.read_runs

    def read_runs(self: FilePool, path: str, offsets: Sequence[int], outs: Sequence[memoryview]) -> None:
        runs.append(len(outs))
        real(self, path, offsets, outs)

    monkeypatch.setattr(FilePool, "read_runs", read_runs)
    path = tmp_path / "a.pth"
    torch.save({"columns": torch.randn(500, 5000)[:, :columns]}, path)
    counts = shardmerge.convert(path, tmp_path / "out").records
    assert sum(runs) > 400
    assert counts == (RecordCounts(1, 500 * 5000 * 4) if whole else RecordCounts(partly=1))
    ((_, offset, nbytes),) = _records(path)
    _flip(path, offset + nbytes - 1)
    with pytest.raises(CheckpointError) if whole else nullcontext():
        shardmerge.convert(path, tmp_path / "again")


def test_what_is_read_at_the_end_is_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a record that was read in runs: by then somebody may write to the file."""
    path, place = tmp_path / "a.pth", Staging.place
    torch.save({"columns": torch.randn(500, 5000)[:, :3072]}, path)

    def placed_then_changed(self: Staging, at: Path, data: bytes | list[bytes]) -> None:
        place(self, at, data)
        if at.name == "00000.json":  # the receipt of the only part
            os.utime(path)

    monkeypatch.setattr(Staging, "place", placed_then_changed)
    with pytest.raises(CheckpointError) as caught:
        shardmerge.convert(path, tmp_path / "out")
    assert caught.value.code == "source-changed"
    assert not (tmp_path / "out").exists()


def test_a_file_without_checksums_converts_and_says_so(tmp_path: Path) -> None:
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"a": torch.arange(1000.0)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    assert not any(info.CRC for info in zipfile.ZipFile(tmp_path / "a.pth").infolist() if "/data/" in info.filename)
    counts = shardmerge.convert(tmp_path / "a.pth", tmp_path / "out").records
    assert counts == RecordCounts(without=1)
    assert "without a CRC-32" in next(counts.unchecked())


# Pieces in any order, some twice.


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_pieces_in_any_order_make_the_checksum(tmp_path: Path, seed: int, damaged: bool) -> None:
    random = Random(seed)
    data = random.randbytes(5000)
    path = tmp_path / "file"
    path.write_bytes(b"head" + data + b"tail")
    records = [Record("r", 4, 5000, crc32(data))]
    if damaged:
        _flip(path, 4 + random.randrange(5000))
    with pytest.raises(CheckpointError) if damaged else nullcontext():
        assert _read_pieces(path, records, random) == RecordCounts(1, 5000)


def _read_pieces(path: Path, records: list[Record], random: Random) -> RecordCounts:
    """By one thread, or several that each know what they read themselves."""
    tables = RecordTables(lambda file: records)
    threads = [(FilePool(), RecordNotes(tables)) for _ in range(random.randrange(1, 4))]
    for pool, notes in threads:
        pool.opened, pool.seen = tables.opened, notes.seen
    for _ in range(random.randrange(1, 60)):
        low = random.randrange(5000)
        high = random.randrange(low, 5000) + 1
        random.choice(threads)[0].read_into(str(path), 4 + low, memoryview(bytearray(high - low)))
    found = [one for _, notes in threads for one in notes.sums()]
    return compare_records(found, FilePool(), lambda file: records)
