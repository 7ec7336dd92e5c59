"""What a gather costs, in counters: every byte once, so many reads at most, every file opened once, as much memory as
planned. And what it makes, against torch. No clocks.

The matrices have true shapes and mostly lie in holes; where values are compared they are smaller, and the tile with
them, so that a matrix is as many tiles and bands.
"""

from __future__ import annotations

import gc
import resource
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.compose import cast_to, compose
from shardmerge.dtypes import DTYPES, DType
from shardmerge.execute.gather import Assembler
from shardmerge.execute.rearrange import rearrange
from shardmerge.plan.memory import LARGEST_TILE, making_peak, tile_elements
from shardmerge.plan.order import first_byte, ordered
from shardmerge.plan.schedule import schedule
from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.storage import reading
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Box, Extent, Piece, Strided, TensorEntry, dense
from shardmerge.tensors.boxes import boxed
from shardmerge.tensors.ranks import Partition, RankChunks, chunk_numel
from shardmerge.tensors.strides import row_major
from tests.made import built

F32, BF16 = DTYPES["F32"], DTYPES["BF16"]
MIB = 1 << 20


@dataclass
class Files:
    """Makes tensors in files; holes, or values that torch can be asked about."""

    folder: Path
    made: int = 0

    def place(self, dtype: DType, numel: int, data: bytes | None = None) -> Extent:
        """A file of so many elements, behind a header of 64 bytes."""
        self.made += 1
        path = self.folder / f"data{self.made}"
        with path.open("wb") as file:
            file.truncate(64 + numel * dtype.itemsize)
            if data is not None:
                file.seek(64)
                file.write(data)
        return Extent(str(path), 64, numel * dtype.itemsize)

    def flat(self, dtype: DType, *shape: int) -> TensorEntry:
        numel = prod(shape)
        return TensorEntry("flat", dtype, shape, dense(self.place(dtype, numel), numel))

    def zero3(self, dtype: DType, shape: tuple[int, ...], world: int) -> TensorEntry:
        chunk = chunk_numel(prod(shape), world)
        parts = tuple(Partition(self.place(dtype, chunk), chunk) for _ in range(world))
        return TensorEntry("zero3", dtype, shape, RankChunks(parts, dtype.itemsize, 0, prod(shape)))

    def view(self, dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorEntry:
        span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
        held = Strided(self.place(dtype, span), shape, strides)
        return TensorEntry("view", dtype, shape, (Piece(0, prod(shape), held),))

    def boxes(
        self, dtype: DType, shape: tuple[int, ...], parts: tuple[int, ...], order: Sequence[int] = ()
    ) -> TensorEntry:
        """A tensor cut into so many parts along each axis, each in a file of its own, its axes in the given order."""
        found = []
        for index in np.ndindex(*parts):
            low = tuple(i * n // k for i, n, k in zip(index, shape, parts, strict=True))
            sizes = tuple((i + 1) * n // k - at for i, n, k, at in zip(index, shape, parts, low, strict=True))
            held = self.place(dtype, prod(sizes))
            strides = row_major(tuple(sizes[axis] for axis in order))
            view = Strided(held, sizes, tuple(strides[list(order).index(axis)] for axis in range(len(order))))
            found.append(Box(low, sizes, view if order else held))
        return TensorEntry("boxes", dtype, shape, boxed(dtype, shape, found))

    def op(self, name: str, *inputs: TensorEntry, **params: object) -> TensorEntry:
        return compose(built(name, **params), list(inputs))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """``needed`` bytes of the sources, and the most reads that getting them may take."""

    make: Callable[[Files], TensorEntry]
    needed: int
    reads: int


CASES = {
    # A window a tile; a tile that two ranks hold is two reads.
    "ZeRO-3, 8 ranks, cast": Case(lambda f: cast_to(f.zero3(F32, (4096, 4096), 8), BF16), 64 * MIB, 32),
    "ZeRO-3, 8 ranks, copied": Case(lambda f: f.zero3(BF16, (4096, 4096), 8), 32 * MIB, 16),
    "ZeRO-3, 8 ranks, ragged": Case(lambda f: cast_to(f.zero3(F32, (3200, 1000), 8), BF16), 12_800_000, 7 + 7),
    "ZeRO-3, 1,024 ranks, cast": Case(lambda f: cast_to(f.zero3(F32, (1024, 4096), 1024), BF16), 16 * MIB, 1024),
    # One band, in MiB; more than one band: a read for each band of each row.
    "transposed": Case(lambda f: f.op("transpose", f.flat(BF16, 4096, 4096)), 32 * MIB, 32),
    "transposed, wide": Case(lambda f: f.op("transpose", f.flat(BF16, 4096, 14336)), 112 * MIB, 4 * 4096),
    "transposed, tall": Case(lambda f: f.op("transpose", f.flat(BF16, 14336, 4096)), 112 * MIB, 4 * 14336),
    "transposed, fp32": Case(lambda f: f.op("transpose", f.flat(F32, 4096, 4096)), 64 * MIB, 2 * 4096),
    "transposed, cast": Case(lambda f: cast_to(f.op("transpose", f.flat(F32, 2048, 2048)), BF16), 16 * MIB, 16),
    "saved transposed": Case(lambda f: f.view(BF16, (4096, 4096), (1, 4096)), 32 * MIB, 32),
    "saved transposed, cast": Case(lambda f: cast_to(f.view(F32, (2048, 2048), (1, 2048)), BF16), 16 * MIB, 16),
    "experts transposed": Case(
        lambda f: f.op("transpose", f.flat(BF16, 8, 2048, 768), dim0=1, dim1=2), 24 * MIB, 8 * 4
    ),
    "experts transposed, stacked": Case(
        lambda f: f.op("stack", *(f.op("transpose", f.flat(BF16, 2048, 768)) for _ in range(4))), 12 * MIB, 4 * 4
    ),
    "columns of transposed experts": Case(
        lambda f: f.op("concat", *(f.op("transpose", f.flat(BF16, 2048, 768)) for _ in range(2)), dim=1), 6 * MIB, 8
    ),
    "transposed and fused by groups": Case(
        lambda f: f.op("grouped_merge", *(f.op("transpose", f.flat(BF16, 2048, 1024)) for _ in range(3)),
                       groups=8, sizes=(128, 128, 128)), 12 * MIB, 3 * 4
    ),
    "ZeRO-3, transposed": Case(lambda f: f.op("transpose", f.zero3(F32, (2048, 2048), 8)), 16 * MIB, 16),
    # Boxes. Whole rows are flat pieces; of narrower ones each is read once a tile, or band.
    "rows in 8 boxes": Case(lambda f: f.boxes(BF16, (4096, 4096), (8, 1)), 32 * MIB, 16),
    "columns in 8 boxes": Case(lambda f: f.boxes(BF16, (4096, 4096), (1, 8)), 32 * MIB, 16 * 8),
    "columns in 8 boxes, cast": Case(lambda f: cast_to(f.boxes(F32, (2048, 4096), (1, 8)), BF16), 32 * MIB, 16 * 8),
    "columns in 1,024 boxes": Case(lambda f: f.boxes(BF16, (4096, 4096), (1, 1024)), 32 * MIB, 2 * 1024),
    "columns in 1,024 boxes, wide": Case(lambda f: f.boxes(BF16, (1024, 16384), (1, 1024)), 32 * MIB, 2 * 1024),
    "columns in 3 boxes, uneven": Case(lambda f: f.boxes(F32, (1001, 4999), (1, 3)), 1001 * 4999 * 4, 10 * 3),
    "boxes of 32 by 32": Case(lambda f: f.boxes(BF16, (4096, 4096), (32, 32)), 32 * MIB, 1024),
    "experts in boxes": Case(lambda f: f.boxes(BF16, (8, 1024, 2048), (2, 1, 4)), 32 * MIB, 16 * 4),
    "experts in boxes of the middle axis": Case(lambda f: f.boxes(BF16, (8, 1024, 2048), (1, 8, 1)), 32 * MIB, 64),
    "one of a stack in boxes": Case(
        lambda f: f.op("slice", f.boxes(BF16, (8, 2048, 2048), (1, 1, 8)), dim=0, start=3, stop=4), 8 * MIB, 4 * 8
    ),
    "boxes side by side": Case(
        lambda f: f.op("concat", *(f.boxes(BF16, (4096, 2048), (1, 4)) for _ in range(2)), dim=1), 32 * MIB, 16 * 8
    ),
    "columns of boxes": Case(
        lambda f: f.op("chunk", f.boxes(BF16, (1024, 12288), (1, 4)), dim=1, chunks=3, take=1), 8 * MIB, 2 * 1024
    ),
    "transposed boxes": Case(lambda f: f.op("transpose", f.boxes(BF16, (4096, 4096), (1, 8))), 32 * MIB, 32 * 8),
    "boxes of transposed rows": Case(lambda f: f.boxes(BF16, (4096, 4096), (8, 1), (1, 0)), 32 * MIB, 8 * 4),
    "boxes of transposed columns": Case(lambda f: f.boxes(BF16, (2048, 4096), (1, 8), (1, 0)), 16 * MIB, 8 * 2),
    # A head is 1 MiB.
    "rotary queries": Case(lambda f: f.op("rotary_permute", f.flat(BF16, 4096, 4096), heads=32), 32 * MIB, 32),
    "rotary keys": Case(lambda f: f.op("rotary_permute", f.flat(BF16, 1024, 4096), heads=8), 8 * MIB, 8),
    "rotary, cast": Case(
        lambda f: cast_to(f.op("rotary_permute", f.flat(F32, 1024, 4096), heads=8), BF16), 16 * MIB, 16
    ),
    # A block of rows of each rank a tile.
    "columns of 2 ranks": Case(
        lambda f: f.op("concat", *(f.flat(BF16, 4096, 2048) for _ in range(2)), dim=1), 32 * MIB, 32
    ),
    "columns of 8 ranks": Case(
        lambda f: f.op("concat", *(f.flat(BF16, 4096, 512) for _ in range(8)), dim=1), 32 * MIB, 128
    ),
    "columns of 8 ranks, cast": Case(
        lambda f: cast_to(f.op("concat", *(f.flat(F32, 1024, 1792) for _ in range(8)), dim=1), BF16), 56 * MIB, 256
    ),
    "rows of 8 ranks": Case(
        lambda f: f.op("concat", *(f.flat(BF16, 512, 4096) for _ in range(8)), dim=0), 32 * MIB, 16
    ),
    "experts stacked": Case(lambda f: f.op("stack", *(f.flat(BF16, 1024, 2048) for _ in range(8))), 32 * MIB, 16),
    "queries of a fused matrix": Case(
        lambda f: f.op("grouped_split", f.flat(BF16, 6144, 4096), groups=8, sizes=(512, 128, 128), take=0),
        32 * MIB,
        16,
    ),
    "keys of a fused matrix": Case(
        lambda f: f.op("grouped_split", f.flat(BF16, 6144, 4096), groups=8, sizes=(512, 128, 128), take=1),
        8 * MIB,
        8,
    ),
    # Views of views are views of what lies in the files.
    "transposed and rotated": Case(
        lambda f: f.op("rotary_permute", f.op("transpose", f.flat(BF16, 2048, 2048)), heads=16), 8 * MIB, 8
    ),
    "a third of a transposed matrix": Case(
        lambda f: f.op("chunk", f.op("transpose", f.flat(F32, 1024, 3072)), dim=0, chunks=3, take=1), 4 * MIB, 1024
    ),
    "a third, transposed": Case(
        lambda f: f.op("transpose", f.op("chunk", f.flat(F32, 1024, 3072), dim=1, chunks=3, take=1)), 4 * MIB, 1024
    ),
    # A read a row.
    "part of every row": Case(
        lambda f: f.op("chunk", f.flat(BF16, 1024, 12288), dim=1, chunks=3, take=1), 8 * MIB, 1024
    ),
    "little of every row": Case(
        lambda f: f.op("slice", f.flat(BF16, 1024, 12288), dim=1, start=256, stop=512), MIB // 2, 1024
    ),
    "convolution, channels last": Case(
        lambda f: f.view(F32, (1024, 3, 14, 14), (588, 1, 42, 3)), 1024 * 588 * 4, 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_every_byte_is_read_once(name: str, io: reading.IoMode, tmp_path: Path) -> None:
    case, files, pool = CASES[name], Files(tmp_path), FilePool(io)
    entry = case.make(files)
    assembler, step = Assembler(pool), tile_elements(entry, LARGEST_TILE)
    for start in range(0, entry.numel, step):
        assembler.release(assembler.view(entry, start, min(step, entry.numel - start)))
    assert case.needed <= pool.bytes_read <= 1.02 * case.needed
    assert pool.reads <= case.reads
    assert pool.opens <= files.made


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [256 << 10, LARGEST_TILE])
def test_no_more_is_allocated_than_planned(name: str, tile: int, tmp_path: Path) -> None:
    entry = CASES[name].make(Files(tmp_path))
    assembler, step = Assembler(FilePool("pread"), tile), tile_elements(entry, tile)
    assembler.release(assembler.view(entry, 0, 1))  # imports and open files are not what is measured
    tracemalloc.start()
    try:
        for start in range(0, min(entry.numel, 3 * step), step):
            assembler.release(assembler.view(entry, start, min(step, entry.numel - start)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= making_peak(entry, tile)


@pytest.mark.parametrize("workers", [2, 4])
def test_a_transposed_matrix_of_an_8b_model_fits_the_default_budget(workers: int, tmp_path: Path) -> None:
    files = Files(tmp_path)
    entries = [files.op("transpose", files.flat(dtype, 14336, 4096)) for dtype in (BF16, F32)]
    entries += [cast_to(entries[1], BF16)]
    tensors = tuple(PlannedTensor("t", entry, "", "t") for entry in entries)
    shard = PlannedShard("model.safetensors", sum(tensor.nbytes for tensor in tensors), (), tensors)
    assert schedule([shard], budget=256 * MIB, workers=workers).workers == workers


# ---- values


def matrix(files: Files, dtype: torch.dtype, *shape: int) -> tuple[TensorEntry, torch.Tensor]:
    """A tensor of random bits and the entry that holds it."""
    size = dtype.itemsize
    bits = np.random.default_rng(prod(shape)).integers(0, 256, prod(shape) * size, dtype=np.uint8)
    values = torch.from_numpy(bits).view(dtype).reshape(shape)
    row = {torch.float32: F32, torch.bfloat16: BF16, torch.uint8: DTYPES["U8"], torch.int64: DTYPES["I64"]}[dtype]
    return TensorEntry("m", row, shape, dense(files.place(row, prod(shape), bits.tobytes()), prod(shape))), values


def bits(values: torch.Tensor) -> bytes:
    return values.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def made(entry: TensorEntry, tile: int) -> bytes:
    """What the engine makes of an entry, tile by tile."""
    assembler, step, parts = Assembler(FilePool(), tile), tile_elements(entry, tile), []
    for start in range(0, entry.numel, step):
        data = assembler.view(entry, start, min(step, entry.numel - start))
        parts.append(bytes(data))
        assembler.release(data)
    return b"".join(parts)


@pytest.mark.parametrize("tile", [4 << 10, 64 << 10, LARGEST_TILE])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_bands_are_what_torch_transposes(dtype: torch.dtype, tile: int, tmp_path: Path) -> None:
    files = Files(tmp_path)
    entry, values = matrix(files, dtype, 301, 1030)
    assert made(files.op("transpose", entry), tile) == bits(values.t())
    entry, values = matrix(files, dtype, 3, 130, 77)
    assert made(files.op("transpose", entry, dim0=1, dim1=2), tile) == bits(values.transpose(1, 2))
    entry, values = matrix(files, dtype, 40, 3, 20, 5)
    assert made(files.op("permute", entry, dims=(2, 0, 3, 1)), tile) == bits(values.permute(2, 0, 3, 1))
    assert made(files.op("permute", entry, dims=(3, 1, 2, 0)), tile) == bits(values.permute(3, 1, 2, 0))


@pytest.mark.parametrize("tile", [4 << 10, 64 << 10, LARGEST_TILE])
def test_casts_of_bands_are_what_torch_casts(tile: int, tmp_path: Path) -> None:
    files = Files(tmp_path)
    entry, values = matrix(files, torch.float32, 520, 1030)
    values = torch.nan_to_num(values, nan=1.5)
    extent = files.place(F32, values.numel(), bits(values))
    entry = TensorEntry("m", F32, (520, 1030), dense(extent, values.numel()))
    assert made(cast_to(files.op("transpose", entry), BF16), tile) == bits(values.t().to(torch.bfloat16))
    parts = [files.op("chunk", files.op("transpose", entry), dim=0, chunks=2, take=take) for take in (1, 0)]
    expected = torch.cat([values.t()[515:], values.t()[:515]], dim=1).to(torch.bfloat16)
    assert made(cast_to(files.op("concat", *parts, dim=1), BF16), tile) == bits(expected)


@pytest.mark.parametrize("tile", [4 << 10, 64 << 10, LARGEST_TILE])
def test_columns_of_bands_are_what_torch_concatenates(tile: int, tmp_path: Path) -> None:
    files = Files(tmp_path)
    entry, values = matrix(files, torch.bfloat16, 130, 1040)
    wide, more = matrix(files, torch.bfloat16, 1040, 77)
    turned = files.op("transpose", entry)
    assert made(files.op("concat", turned, wide, turned, dim=1), tile) == bits(
        torch.cat([values.t(), more, values.t()], 1)
    )
    fused = torch.cat([values.t().reshape(8, -1), more.reshape(8, -1)], 1)
    sizes = {"groups": 8, "sizes": (130, 130)}
    assert made(files.op("grouped_merge", turned, turned, **sizes), tile) == bits(
        torch.cat([values.t().reshape(8, 130, 130)] * 2, 1)
    )
    flat = files.op(
        "concat", files.op("reshape", turned, shape=(8, -1)), files.op("reshape", wide, shape=(8, -1)), dim=1
    )
    assert made(flat, tile) == bits(fused)


@st.composite
def moves(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
    """A shape, and some permutes, slices and reshapes one after the other."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    found: list[tuple[str, tuple[int, ...]]] = []
    now = list(shape)
    for _ in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from(["permute", "slice", "reshape"]))
        if kind == "permute":
            params = tuple(draw(st.permutations(range(len(now)))))
            now = [now[axis] for axis in params]
        elif kind == "slice":
            axis = draw(st.integers(0, len(now) - 1))
            start = draw(st.integers(0, now[axis] - 1))
            params = (axis, start, draw(st.integers(start + 1, now[axis])))
            now[axis] = params[2] - start
        else:
            axis = draw(st.integers(0, len(now) - 2))
            both = now[axis] * now[axis + 1]
            first = draw(st.sampled_from([n for n in range(1, both + 1) if both % n == 0]))
            now[axis : axis + 2] = [first, both // first] if draw(st.booleans()) or len(now) == 2 else [both]
            params = tuple(now)
        found.append((kind, params))
    return shape, found


@given(case=moves())
@settings(max_examples=150, deadline=None)
def test_views_of_views_are_what_torch_makes_of_them(
    case: tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, found = case
    files = Files(tmp_path_factory.mktemp("views"))
    entry, values = matrix(files, torch.float32, *shape)
    for kind, params in found:
        if kind == "permute":
            entry, values = files.op("permute", entry, dims=params), values.permute(params)
        elif kind == "slice":
            axis, start, stop = params
            entry = files.op("slice", entry, dim=axis, start=start, stop=stop)
            values = values.narrow(axis, start, stop - start)
        else:
            entry, values = files.op("reshape", entry, shape=params), values.reshape(params)
    assert made(entry, LARGEST_TILE) == bits(values)


@pytest.mark.parametrize("tile", [4 << 10, LARGEST_TILE])
def test_runs_apart_are_what_torch_slices(tile: int, tmp_path: Path) -> None:
    files = Files(tmp_path)
    entry, values = matrix(files, torch.bfloat16, 64, 20_000)
    for start, stop in ((0, 3), (777, 2000), (19_990, 20_000), (5, 19_000)):
        assert made(files.op("slice", entry, dim=1, start=start, stop=stop), tile) == bits(values[:, start:stop])
    expected = values[:, 100:8292].reshape(64, 4, 2048).permute(1, 0, 2)
    entry = TensorEntry(
        "v",
        BF16,
        (4, 64, 2048),
        (Piece(0, 4 * 64 * 2048, Strided(entry.pieces[0].held.slice(200, 63 * 40_000 + 8192 * 2),  # type: ignore[union-attr]
                                         (4, 64, 2048), (2048, 20_000, 1))),),
    )  # fmt: skip
    assert made(entry, tile) == bits(expected)


@given(shape=st.lists(st.integers(1, 40), min_size=2, max_size=4), data=st.data())
@settings(max_examples=60)
def test_arrays_of_any_strides_are_rearranged_as_numpy_copies(shape: list[int], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]))
    order, back = (data.draw(st.permutations(range(len(shape)))) for _ in range(2))
    cut = data.draw(st.integers(0, 3))
    big = [n + cut for n in shape]
    source = np.arange(prod(big), dtype=np.uint64).astype(dtype).reshape([big[axis] for axis in order])
    source = source.transpose(np.argsort(order))[tuple(slice(cut, None) for _ in big)]
    target = np.zeros([shape[axis] for axis in back], dtype).transpose(np.argsort(back))
    rearrange(target, source)
    assert np.array_equal(target, source)


# ---- files


def test_more_ranks_than_the_soft_limit_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft limit is the system's, not ours: it is raised as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1024:
        pytest.skip(f"this system allows {hard} open files")
    gc.collect()  # files that errors of other tests still hold
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        pool = FilePool()
        files = Files(tmp_path)
        entries = [files.zero3(F32, (600, 64), 600)]
        entries += [TensorEntry("again", F32, (600, 64), entries[0].pieces)] * 2
        for entry in entries:
            Assembler(pool).fill(entry, 0, memoryview(bytearray(entry.nbytes)))
        assert pool.reads == 3 * 600
        assert pool.opens == 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pool_keeps_to_what_it_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "most_open_files", lambda: 16)
    pool, files = FilePool(), Files(tmp_path)
    entry = files.zero3(F32, (100, 64), 100)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    Assembler(pool).fill(entry, 0, memoryview(bytearray(entry.nbytes)))
    assert pool.opens == 100
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 16


# ---- order


def test_tensors_are_made_in_the_order_of_their_sources(tmp_path: Path) -> None:
    """Each file is read from front to back, and tensors of nothing come first."""
    files = Files(tmp_path)
    extents = [files.place(F32, 4000) for _ in range(2)]
    places = [(0, 3000), (1, 0), (0, 0), (1, 2000), (0, 1000)]
    entries = [TensorEntry("t", F32, (100,), dense(extents[file].slice(4 * start, 400), 100)) for file, start in places]
    entries[2] = cast_to(entries[2], BF16)
    entries[3] = files.op("concat", entries[3], entries[0])
    entries += [files.view(F32, (10, 10), (1, 10)), files.op("fill", shape=(3,), value=1)]
    planned = [PlannedTensor(str(n), entry, "", "") for n, entry in enumerate(entries)]
    assert [tensor.name for tensor in ordered(planned)] == ["6", "2", "4", "0", "1", "3", "5"]
    assert first_byte(entries[3]) == (extents[1].file, 64 + 4 * 2000)
