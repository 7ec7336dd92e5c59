"""Sums, comparisons and constants against torch, however the tensor is cut."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from shardmerge.compose import compose
from shardmerge.errors import CheckpointError, MappingError
from shardmerge.execute.gather import Assembler
from shardmerge.ops.parts import PART
from shardmerge.storage.reading import FilePool
from tests.made import built, check_cuts, check_peak, filled, made

torch = pytest.importorskip("torch")
TYPES = ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn")


def values(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal(shape)
    return found.astype(getattr(ml_dtypes, dtype, None) or dtype)


def widened(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64 if array.dtype == np.float64 else np.float32))


@pytest.mark.parametrize("dtype", TYPES)
def test_weighted_sums_are_those_of_torch(dtype: str, tmp_path: Path) -> None:
    inputs = [values((31, 67), dtype, seed) for seed in range(3)]
    a, b, c = (widened(one) for one in inputs)
    wide = a.dtype
    weights = [torch.tensor(w, dtype=wide) for w in (0.3, -1.5, 2.0)]
    cases = [
        (built("linear", weights=(0.3, -1.5, 2.0)), a * weights[0] + b * weights[1] + c * weights[2]),
        (built("add"), a + b + c),
    ]
    for op, expected in cases:
        found = check_cuts(made(op, tmp_path, inputs))
        assert found.tobytes() == expected.numpy().tobytes()
    mean = check_cuts(made(built("linear"), tmp_path, inputs))
    assert np.allclose(mean, torch.stack([a, b, c]).mean(0), rtol=1e-6, atol=1e-6)
    half = check_cuts(made(built("scale", factor=0.1), tmp_path, inputs[:1]))
    assert half.tobytes() == (a * torch.tensor(0.1, dtype=wide)).numpy().tobytes()


def test_float64_decides_the_type_and_overflow_is_counted(tmp_path: Path) -> None:
    mixed = made(built("add"), tmp_path, [values((5,), "bfloat16"), values((5,), "float64")])
    assert mixed.dtype.name == "F64"
    large = np.array([3e38, 1.0, np.inf, -3e38], np.float32)
    entry = made(built("add"), tmp_path, [large, large])
    assembler = Assembler(FilePool())
    assembler.fill(entry, 0, memoryview(bytearray(16)))
    assert assembler.overflowed == 2


def test_overflows_of_all_parts_of_a_tile_are_counted(tmp_path: Path) -> None:
    large = np.ones(2 * PART + 1, np.float32)
    large[[0, PART, 2 * PART]] = 3e38
    assembler = Assembler(FilePool())
    assembler.fill(made(built("add"), tmp_path, [large, large]), 0, memoryview(bytearray(large.nbytes)))
    assert assembler.overflowed == 3


@pytest.mark.parametrize(
    ("base", "delta"),
    [
        ((40, 64), (40, 64)),
        ((37, 64), (40, 64)),
        ((37, 50), (40, 64)),
        ((40, 50), (40, 64)),
        ((9,), (12,)),
        ((3, 0), (4, 5)),
    ],
)
def test_a_base_is_added_to_the_top_left_as_llava_does(base, delta, tmp_path: Path) -> None:
    for dtype in TYPES:
        b, d = values(base, dtype, 1), values(delta, dtype, 2)
        expected = widened(d).clone()
        expected[tuple(slice(n) for n in base)] += widened(b)
        found = check_cuts(made(built("add_top_left"), tmp_path, [b, d]))
        assert found.tobytes() == expected.numpy().tobytes()


def test_equal_tensors_are_the_first_of_them(tmp_path: Path) -> None:
    a = values((33, 40), "bfloat16")
    a[3, 4] = np.nan
    found = check_cuts(made(built("assert_equal"), tmp_path, [a, a.astype(np.float32), a.astype(np.float64)]))
    assert found.tobytes() == a.tobytes()
    for whole in (np.arange(100).reshape(4, 25), np.arange(100) % 3 == 0, np.arange(100, dtype=np.uint64) << 56):
        assert check_cuts(made(built("assert_equal"), tmp_path, [whole, whole])).tobytes() == whole.tobytes()


@pytest.mark.parametrize("dtype", ["int64", "bfloat16", "float32", "bool"])
def test_the_first_difference_is_named(dtype: str, tmp_path: Path) -> None:
    a = np.zeros(9000, getattr(ml_dtypes, dtype, None) or dtype)
    b, c = a.copy(), a.copy()
    b[8001], c[7003], c[8500] = 1, 1, 1
    entry = made(built("assert_equal"), tmp_path, [a, b, c])
    for tile in (1 << 10, 2 << 20):
        with pytest.raises(CheckpointError, match="7,003") as caught:
            filled(entry, tile)
        assert caught.value.code == "not-equal"
        assert "tensor 3" in caught.value.found


def test_constants_and_counts() -> None:
    half = check_cuts(compose(built("fill", shape=(3, 70), dtype="bfloat16", value=0.1), []))
    assert half.tobytes() == torch.full((3, 70), 0.1, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert check_cuts(compose(built("fill", shape=(4,)), [])).tobytes() == bytes(16)
    count = check_cuts(compose(built("arange", shape=(1, 577)), []))
    assert np.array_equal(count, torch.arange(577).expand(1, -1).numpy())
    assert count.dtype == np.int64
    assert compose(built("arange", shape=(0, 4)), []).pieces == ()


@pytest.mark.parametrize(
    ("name", "params", "shapes"),
    [
        ("linear", {"weights": (1.0, 2.0, 3.0)}, [(1000, 777)] * 3),
        ("add", {}, [(1000, 777)] * 4),
        ("scale", {"factor": 3.0}, [(1000, 777)]),
        ("assert_equal", {}, [(1000, 777)] * 3),
        ("add_top_left", {}, [(900, 777), (1000, 777)]),
        ("add_top_left", {}, [(900, 700), (1000, 777)]),
    ],
)
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float64", "float32")])
def test_no_more_memory_than_planned(name, params, shapes, dtypes, tmp_path: Path) -> None:
    seed = 0 if name == "assert_equal" else 1
    inputs = [values(shape, "bfloat16", seed * k).astype(_type(dtypes[k % 2])) for k, shape in enumerate(shapes)]
    check_peak(made(built(name, **params), tmp_path, inputs))


def _type(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def test_constants_take_no_more_than_planned() -> None:
    check_peak(compose(built("fill", shape=(1000, 777), value=2), []))
    check_peak(compose(built("arange", shape=(1000, 777)), []))


BAD = [
    ("linear", {}, [("float32", (2, 3)), ("float32", (3, 2))], "op-shape"),
    ("linear", {}, [("int64", (2, 3)), ("float32", (2, 3))], "op-shape"),
    ("linear", {"weights": (1.0,)}, [("float32", (2,)), ("float32", (2,))], "op-value"),
    ("assert_equal", {}, [("int64", (2,)), ("int32", (2,))], "op-shape"),
    ("assert_equal", {}, [("float32", (2,)), ("float32", (3,))], "op-shape"),
    ("add_top_left", {}, [("float32", (4, 2)), ("float32", (3, 2))], "op-shape"),
    ("add_top_left", {}, [("float32", (2,)), ("float32", (2, 2))], "op-shape"),
    ("add_top_left", {}, [("float32", (2, 2, 2)), ("float32", (2, 2, 2))], "op-shape"),
]


@pytest.mark.parametrize(("name", "params", "inputs", "code"), BAD)
def test_what_cannot_be_computed_is_said(name, params, inputs, code, tmp_path: Path) -> None:
    with pytest.raises(MappingError) as caught:
        made(built(name, **params), tmp_path, [np.zeros(shape, dtype) for dtype, shape in inputs])
    assert caught.value.code == code


@pytest.mark.parametrize(
    "values",
    [{"shape": (-1,)}, {"shape": (2,), "dtype": "float16", "value": 1e6}, {"shape": (2,), "value": float("inf")}],
)
def test_constants_that_make_no_sense(values) -> None:
    with pytest.raises(MappingError) as caught:
        built("fill", **values)
    assert caught.value.code == "op-value"
