"""Products of matrices: their bits, how few calls they take, and the threads of the BLAS that makes them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

import shardmerge
from shardmerge.errors import ShardmergeError
from shardmerge.execute import worker
from shardmerge.execute.checksum import crc32
from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import one_thread
from shardmerge.ops.contract import Arithmetic
from shardmerge.ops.dora import Dora
from shardmerge.ops.lora import Lora
from shardmerge.ops.merging import Ties
from shardmerge.ops.pointwise import Linear
from tests.counting import calls
from tests.op_harness import ArrayStream, execute, meta_of

torch = pytest.importorskip("torch")
merges = pytest.importorskip("benchmarks.merges")
synthetic = pytest.importorskip("benchmarks.synthetic")

# Rank, width and rows: one block and less; several below and beside each other, cut at both ends; of 128, 64 and 32
# rows; of all columns that the rank allows.
SHAPES = [(8, 40, 20), (64, 1000, 300), (16, 4096, 130), (8, 6000, 100), (200, 9000, 40), (4, 20000, 70)]


def factors(rank: int, width: int, height: int, dtype: type) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(rank)
    shapes = (rank, width), (height, rank), (height, width)
    a, b, base = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return a, b, base


def wide(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


@pytest.mark.parametrize("scale", [2.0, -0.25, 16 / 12])
@pytest.mark.parametrize(("rank", "width", "height"), SHAPES)
def test_lora_is_torch_in_float64_rounded_once(rank: int, width: int, height: int, scale: float) -> None:
    """Of 16-bit factors: their sums are exact in float64, so no order of summation excuses a difference."""
    a, b, base = factors(rank, width, height, ml_dtypes.bfloat16)
    expected = wide(base) + scale * (wide(b) @ wide(a))
    found = execute(Lora(scale), (a, b, base))
    assert found.array.tobytes() == expected.to(torch.float32).numpy().tobytes()
    assert not found.overflows
    assert execute(Lora(scale), (a, b, base.astype(np.float64))).array.tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize(("rank", "width", "height"), SHAPES)
def test_dora_is_torch_in_float64(rank: int, width: int, height: int) -> None:
    """``W`` is rounded to float32, and once more with its length: two roundings of half a unit at most."""
    a, b, base = factors(rank, width, height, ml_dtypes.bfloat16)
    magnitude = np.linspace(0.5, 2, height, dtype=np.float32)
    merged = wide(base) + 0.5 * (wide(b) @ wide(a))
    expected = wide(magnitude)[:, None] * merged / torch.linalg.norm(merged, dim=1, keepdim=True)
    found = execute(Dora(0.5), (a, b, magnitude, base))
    np.testing.assert_allclose(found.array, expected.numpy(), rtol=1.3e-7, atol=0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_what_was_finite_overflows(kind: str) -> None:
    """One row: too large a sum; infinite in the base; NaN in B, which LoRA's product shows and DoRA's row cannot."""
    a, b, base = (np.ones(shape, np.float32) for shape in ((2, 5), (4, 2), (4, 5)))
    base[0], b[0] = 3e38, 1e38
    base[1, 2] = np.inf
    b[2, 0] = np.nan
    if kind == "lora":
        found = execute(Lora(1.0), (a, b, base))
        assert found.overflows == 5
        assert np.isfinite(found.array).sum() == 5 + 4
    else:
        found = execute(Dora(1.0), (a, b, np.full(4, 2.0, np.float32), base))
        assert found.overflows == 5 + 5


def calls_for_a_tile(op: Arithmetic, arrays: tuple[Array, ...], count: int) -> int:
    """Returns the calls, of Python and of numpy, that making so many elements from the first on takes."""
    metas = [meta_of(array) for array in arrays]
    state = op.prepare([ArrayStream(array) for array in arrays])
    ranges = op.ranges(metas, 0, count)
    tiles = [array.reshape(-1)[low : low + n] for array, (low, n) in zip(arrays, ranges, strict=True)]
    out = np.empty(count, np.float32)
    op.apply(state, tiles, 0, out)  # what is looked for once
    return calls(lambda: op.apply(state, tiles, 0, out))


@pytest.mark.parametrize(("width", "height"), [(4096, 128), (14336, 32), (1024, 512)])
def test_lora_takes_few_calls(width: int, height: int) -> None:
    """Each holds the interpreter for a while. Blocks of 32 by 512 took 800 to 870, and more than four workers of them
    were slower than four.
    """
    arrays = factors(64, width, height, ml_dtypes.bfloat16)
    assert calls_for_a_tile(Lora(2.0), arrays, width * height) <= 300


def test_merges_take_few_calls() -> None:
    arrays = tuple(factors(8, 4096, 128, np.float32)[2] + np.float32(n) for n in range(3))
    assert calls_for_a_tile(Linear(), arrays, 1 << 19) <= 120
    assert calls_for_a_tile(Ties(density=(0.2,)), arrays, 1 << 19) <= 950


# ---- threads of the BLAS


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """A caller that lets its BLAS have two threads."""
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        if blas_threads() != {2}:
            pytest.fail(f"the BLAS of this numpy takes no orders: {blas_threads()} threads")
        yield


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mapping that merges a LoRA into a base of a few tensors."""
    shape = synthetic.LlamaShape(256, 2, 4, 2, 512, 256)
    return merges.write_lora(tmp_path_factory.mktemp("lora"), shape, 16, fill=True)


@pytest.mark.usefixtures("two_threads")
def test_a_run_has_one_thread_and_the_caller_gets_theirs_back(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    monkeypatch.setattr(worker, "crc32", lambda data, value: (seen.append(blas_threads()), crc32(data, value))[1])
    shardmerge.run(lora, out=tmp_path / "out")
    assert seen
    assert set().union(*seen) == {1}
    assert blas_threads() == {2}


@pytest.mark.usefixtures("two_threads")
def test_a_run_that_fails_gives_them_back_too(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lora.parent / "base" / "model.safetensors"
    whole = base.read_bytes()

    def spoil(data: memoryview, value: int) -> int:
        base.write_bytes(whole[:-1])
        return crc32(data, value)

    monkeypatch.setattr(worker, "crc32", spoil)
    try:
        with pytest.raises(ShardmergeError):
            shardmerge.run(lora, out=tmp_path / "out")
    finally:
        base.write_bytes(whole)
    assert blas_threads() == {2}


@pytest.mark.usefixtures("two_threads")
def test_a_tensor_that_is_read_lazily_gives_them_back(lora: Path) -> None:
    tensor = shardmerge.open_checkpoint(lora)["model.layers.0.self_attn.q_proj.weight"]
    seen: list[set[int]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == "narrow":  # what follows a product
            seen.append(blas_threads())

    sys.setprofile(note)
    try:
        assert tensor.numpy().shape == (256, 256)
    finally:
        sys.setprofile(None)
    assert seen == [{1}] * len(seen) != []
    assert blas_threads() == {2}


@pytest.mark.usefixtures("two_threads")
def test_other_threads_change_nothing_meanwhile() -> None:
    """What workers do for each tile, while the thread that started them holds the number."""
    with one_thread():
        seen: list[set[int]] = []

        def tile() -> None:
            with one_thread():
                seen.append(blas_threads())
            seen.append(blas_threads())

        worker = threading.Thread(target=tile)
        worker.start()
        worker.join()
        assert seen == [{1}, {1}]
    assert blas_threads() == {2}
