"""Reading ranges of tensors: views against numpy and torch, partitions against concatenation, CRC against zlib."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.compose import compose
from shardmerge.dtypes import DTYPES
from shardmerge.errors import CheckpointError
from shardmerge.execute.checksum import combine
from shardmerge.execute.gather import Assembler, gather
from shardmerge.sources.zero import FlatGroup, flat_offsets
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.tensors import Extent, Piece, Strided, TensorEntry, dense
from shardmerge.tensors.pieces import single_extent
from shardmerge.tensors.ranks import Partition, RankChunks, chunk_numel
from tests.made import built

F32 = DTYPES["F32"]


def write_floats(path: Path, values: np.ndarray) -> Extent:
    data = values.astype(np.float32).tobytes()
    path.write_bytes(b"head" + data)
    return Extent(str(path), 4, len(data))


def read(entry: TensorEntry, start: int, count: int, pool: FilePool | None = None) -> np.ndarray:
    out = bytearray(4 * count)
    gather(pool or FilePool(), entry, start, memoryview(out))
    return np.frombuffer(out, np.float32)


@st.composite
def strided_views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and the strides of a permuted, sliced or expanded view of a dense array."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    base = np.zeros(tuple(shape[axis] + draw(st.integers(0, 2)) for axis in order), np.uint8)
    view = base[tuple(slice(0, shape[axis]) for axis in order)].transpose(np.argsort(order))
    strides = [s if draw(st.integers(0, 4)) else 0 for s in view.strides]
    return shape, tuple(strides)


@given(view=strided_views(), data=st.data())
def test_any_range_of_a_strided_view_is_what_numpy_sees(view, data, tmp_path_factory) -> None:
    shape, strides = view
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    values = np.arange(span, dtype=np.float32)
    extent = write_floats(tmp_path_factory.mktemp("view") / "data", values)
    entry = TensorEntry("t", F32, shape, (Piece(0, prod(shape), Strided(extent, shape, strides)),))
    expected = np.lib.stride_tricks.as_strided(values, shape, tuple(4 * s for s in strides)).reshape(-1)
    start = data.draw(st.integers(0, prod(shape) - 1))
    count = data.draw(st.integers(0, prod(shape) - start))
    assert np.array_equal(read(entry, start, count), expected[start : start + count])


def test_a_transposed_matrix_is_read_once_and_rearranged(tmp_path: Path) -> None:
    values = np.arange(64 * 32, dtype=np.float32)
    extent = write_floats(tmp_path / "data", values)
    entry = TensorEntry("t", F32, (32, 64), (Piece(0, 2048, Strided(extent, (32, 64), (1, 32))),))
    pool = FilePool()
    assert np.array_equal(read(entry, 0, 2048, pool), values.reshape(64, 32).T.reshape(-1))
    assert pool.reads == 1
    assert pool.bytes_read == 4 * 2048


@pytest.mark.parametrize("strides", [(100_000, 2, 1), (100_000, 3, 1), (2, 100_000, 1), (100_000, 0, 1)])
def test_runs_that_overlap_are_what_numpy_sees(strides: tuple[int, ...], tmp_path: Path) -> None:
    """Far apart from each other, so that reading each for itself would pay if they were runs."""
    shape = (2, 3, 4)
    values = np.arange(sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1, dtype=np.float32)
    extent = write_floats(tmp_path / "data", values)
    entry = TensorEntry("t", F32, shape, (Piece(0, prod(shape), Strided(extent, shape, strides)),))
    expected = np.lib.stride_tricks.as_strided(values, shape, tuple(4 * s for s in strides)).reshape(-1)
    assert np.array_equal(read(entry, 0, prod(shape)), expected)


@pytest.mark.parametrize(("step", "ahead"), [(8192, True), (32768, False)])
def test_what_lies_between_runs_is_read_ahead_where_it_is_not_too_much(
    step: int, ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times as much at most. The buffer is given back."""
    values = np.arange(15 * step + 2048, dtype=np.float32)
    extent = write_floats(tmp_path / "data", values)
    entry = TensorEntry("t", F32, (16, 2048), (Piece(0, 16 * 2048, Strided(extent, (16, 2048), (step, 1))),))
    asked = []
    monkeypatch.setattr(FilePool, "expect", lambda pool, *given: asked.append(given))
    assembler, out = Assembler(FilePool()), bytearray(entry.nbytes)
    assembler.fill(entry, 0, memoryview(out))
    expected = np.lib.stride_tricks.as_strided(values, (16, 2048), (4 * step, 4)).reshape(-1)
    assert np.array_equal(np.frombuffer(out, np.float32), expected)
    assert bool(asked) == ahead
    assert [len(buffer) for buffer in assembler._free] == [len(out)]


@given(data=st.data())
def test_any_range_of_pieces_is_their_concatenation(data: st.DataObject, tmp_path_factory) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    values = np.arange(sum(sizes), dtype=np.float32)
    extent = write_floats(tmp_path_factory.mktemp("pieces") / "data", values)
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    pieces = tuple(Piece(at, n, extent.slice(4 * at, 4 * n)) for at, n in zip(starts, sizes, strict=True))
    entry = TensorEntry("t", F32, values.shape, pieces)
    start = data.draw(st.integers(0, len(values) - 1))
    count = data.draw(st.integers(0, len(values) - start))
    assert np.array_equal(read(entry, start, count), values[start : start + count])


@given(rows=st.integers(1, 5), widths=st.lists(st.integers(1, 4), min_size=1, max_size=3), data=st.data())
def test_any_range_of_columns_is_what_numpy_sees(rows, widths, data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("columns")
    parts = [np.arange(rows * width, dtype=np.float32).reshape(rows, width) + 100 * n for n, width in enumerate(widths)]
    bases = tuple(
        TensorEntry(f"b{n}", F32, part.shape, dense(write_floats(folder / str(n), part), part.size))
        for n, part in enumerate(parts)
    )
    joined = np.concatenate(parts, axis=1)
    entry = compose(built("concat", dim=1), list(bases))
    start = data.draw(st.integers(0, joined.size - 1))
    count = data.draw(st.integers(0, joined.size - start))
    assert np.array_equal(read(entry, start, count), joined.reshape(-1)[start : start + count])


@given(numels=st.lists(st.integers(0, 9), min_size=1, max_size=8), world=st.integers(1, 5), skip=st.integers(0, 3))
def test_stage_2_pieces_tile_every_parameter(numels: list[int], world: int, skip: int) -> None:
    """The oracle is concatenation: element k of the flat group has value k."""
    shapes = [(n,) for n in numels]
    offsets = flat_offsets(shapes, [skip] * len(shapes))
    part = -(-max(offsets[-1], 1) // (2 * world)) * 2
    sizes = [max(min(part, offsets[-1] - rank * part), 0) for rank in range(world)]
    parts = [Partition(Extent(f"rank{rank}", 0, 4 * size), size) for rank, size in enumerate(sizes)]
    group = FlatGroup.of(F32, parts)
    for (numel,), start in zip(shapes, offsets, strict=False):
        found = []
        for piece in group.pieces(start, numel):
            assert piece.start == len(found)
            rank = int(piece.held.file.removeprefix("rank"))
            found += range(rank * part + piece.held.offset // 4, rank * part + piece.held.offset // 4 + piece.count)
        assert found == list(range(start, start + numel))


@given(numel=st.integers(0, 40), world=st.integers(1, 9), start=st.integers(0, 5))
def test_stage_3_chunks_tile_every_parameter_without_its_padding(numel: int, world: int, start: int) -> None:
    chunk = chunk_numel(numel, world)
    parts = [Partition(Extent(f"rank{rank}", 0, 4 * (start + chunk)), start + chunk) for rank in range(world)]
    chunks = RankChunks(parts, 4, start, numel)
    covered = []
    for rank, piece in enumerate(chunks):
        assert piece.held == Extent(f"rank{rank}", 4 * start, 4 * piece.count)
        assert piece.start == rank * chunk
        covered += range(piece.start, piece.start + piece.count)
    assert covered == list(range(numel))


def test_a_range_touches_only_the_pieces_it_needs() -> None:
    asked = []

    class Counting(RankChunks):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    parts = [Partition(Extent(f"rank{rank}", 0, 4000), 1000) for rank in range(1024)]
    entry = TensorEntry("t", F32, (1_024_000,), Counting(parts, 4, 0, 1_024_000))
    assert single_extent(entry, 500_100, 200) == Extent("rank500", 400, 800)
    assert len(asked) < 20  # a bisection, not a walk


def test_a_file_that_shrank_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8 << 20))
    for mode in ("mmap", "pread"):
        pool = FilePool(mode)
        pool.get(str(path))
        with path.open("r+b") as file:
            file.truncate(1 << 20)
        with pytest.raises(CheckpointError) as caught:
            pool.view(str(path), 0, 8 << 20)
        assert caught.value.code == "truncated-file"
        path.write_bytes(bytes(8 << 20))


def test_mapped_and_read_bytes_are_the_same(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 << 20)
    path = tmp_path / "data"
    path.write_bytes(data)
    for mode in ("mmap", "pread"):
        assert bytes(FilePool(mode).view(str(path), 12_345, 2 << 20)) == data[12_345 : 12_345 + (2 << 20)]


def test_a_directory_is_not_read_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        SourceFile(tmp_path)
    assert caught.value.code in ("not-a-file", "unreadable-file")


def test_a_file_that_is_put_away_is_there_for_whoever_reads_it(tmp_path: Path) -> None:
    """A pool holds some files open: the one that it closes for another may be in use."""
    pool = FilePool(sharers=1 << 20)
    for number in range(40):
        (tmp_path / str(number)).write_bytes(b"%02d" % number)
    held = [pool.get(str(tmp_path / str(number))) for number in range(40)]
    assert [file.read(0, 2) for file in held] == [b"%02d" % number for number in range(40)]
    pool.get(held[0].path)
    assert pool.opens == 41


def test_threads_that_ask_for_one_file_open_it_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    pool = FilePool()
    pool.opened = lambda file: time.sleep(0.05)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: pool.get(str(tmp_path / "file")), range(4)))
    assert (pool.opens, len(set(map(id, found)))) == (1, 1)


def test_a_pipe_with_a_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code = "import sys; from shardmerge.storage.reading import SourceFile; SourceFile(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "pipe")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "not-a-file" in done.stderr


@given(first=st.binary(max_size=200), second=st.binary(max_size=5000))
def test_checksums_combine_as_zlib_computes_them(first: bytes, second: bytes) -> None:
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_an_empty_tensor_has_no_pieces() -> None:
    assert dense(Extent("x", 0, 0), 0) == ()
