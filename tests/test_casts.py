"""Casts against torch, on every bit pattern where there are few enough, and against exact rounding for float64."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.dtypes import DTYPES, DType, float_dtype
from shardmerge.errors import UsageError
from shardmerge.ops import fast_casts
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.casts import CASTABLE, Cast
from shardmerge.ops.fast_casts import Kernel, agrees
from tests.op_harness import execute

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=["fast", "exact"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernels of numkong, where they are installed, and without."""
    if request.param == "exact":
        monkeypatch.setattr(fast_casts, "numkong", lambda: None)
    elif fast_casts.numkong() is None:
        pytest.skip("numkong is not installed")
    return request.param


_PAIRS = [(a, b) for a, b in permutations(sorted(CASTABLE), 2) if a != "F64"]


def every_value(dtype: DType) -> Array:
    """All patterns of 8 and 16 bits; of float32 the 65,536 high halves with the low halves around each tie."""
    if dtype.itemsize <= 2:
        return np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(numpy_dtype(dtype))
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    lows = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    return np.concatenate([high | low for low in lows]).astype(np.uint32).view(np.float32)


def torch_cast(values: Array, source: DType, target: DType) -> Array:
    tensor = torch.from_numpy(values.view(np.uint8)).view(getattr(torch, source.torch))
    cast = tensor.to(getattr(torch, target.torch))
    return cast.view(torch.uint8).numpy().view(numpy_dtype(target))


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize(("source", "target"), _PAIRS)
def test_every_cast_has_the_bits_of_torch(source: str, target: str) -> None:
    same_as_torch(every_value(DTYPES[source]), DTYPES[source], DTYPES[target])


def same_as_torch(values: Array, source: DType, target: DType) -> None:
    out = cast(values, source, target)
    expected = torch_cast(values, source, target)
    nan = np.isnan(expected) if target.itemsize == 4 else is_nan(expected, target)
    assert np.array_equal(nan, is_nan(out, target))
    width = f"u{target.itemsize}"
    assert np.array_equal(expected.view(width)[~nan], out.view(width)[~nan])


def is_nan(values: Array, dtype: DType) -> Array:
    return np.isnan(values.astype(np.float64 if dtype.itemsize == 8 else np.float32))


def cast(values: Array, source: DType, target: DType) -> Array:
    out = np.empty(values.shape, numpy_dtype(target))
    Cast(source, target).apply(None, [values], 0, out)
    return out


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("target", [b for a, b in _PAIRS if a == "F32" and b != "F64"])
def test_random_bits_of_float32_have_the_bits_of_torch(target: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(4):
        same_as_torch(rng.integers(0, 1 << 32, 1 << 20, np.uint32).view(np.float32), DTYPES["F32"], DTYPES[target])


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize(("source", "target"), _PAIRS)
def test_neither_cuts_nor_alignment_change_a_bit(source: str, target: str) -> None:
    """NaN included: a cast of the same bytes is the same bytes, whatever the memory budget was."""
    rng = np.random.default_rng(3)
    values = every_value(DTYPES[source])
    whole = cast(values, DTYPES[source], DTYPES[target])
    low = 0
    while low < values.size:
        high = low + int(rng.integers(1, max(values.size // 9, 2)))
        part = np.zeros(values[low:high].nbytes + 1, np.uint8)
        part[1:] = values[low:high].view(np.uint8)
        odd = part[1:].view(values.dtype)
        assert cast(odd, DTYPES[source], DTYPES[target]).tobytes() == whole[low:high].tobytes()
        low = high


@pytest.mark.usefixtures("road")
def test_arrays_with_gaps_are_not_read_as_if_they_had_none() -> None:
    wide = every_value(DTYPES["F32"])[: 1 << 17]
    out = np.zeros(1 << 17, np.float16)
    Cast(DTYPES["F32"], DTYPES["F16"]).apply(None, [wide[::2]], 0, out[::2])
    assert out[::2].tobytes() == cast(wide[::2].copy(), DTYPES["F32"], DTYPES["F16"]).tobytes()
    assert not out[1::2].any()


_DIGEST = """
import hashlib, sys, warnings
warnings.simplefilter("ignore")
if sys.argv[1] == "no library":
    sys.modules["numkong"] = None
elif sys.argv[1] == "no SIMD":
    import numkong
    for name, there in numkong.get_capabilities().items():
        if there and name != "serial":
            numkong.disable_capability(name)
import numpy as np
from tests.test_casts import _PAIRS, DTYPES, cast, every_value
for source, target in _PAIRS:
    print(source, target, hashlib.sha256(cast(every_value(DTYPES[source]), DTYPES[source], DTYPES[target])).hexdigest())
"""


def test_no_cpu_and_no_library_changes_a_bit() -> None:
    """Kernels for other instructions are used only as far as they agree, so a receipt holds on another machine."""
    ways = ["all", "no library", *(["no SIMD"] if fast_casts.numkong() else [])]
    found = [subprocess.run([sys.executable, "-c", _DIGEST, way], capture_output=True, text=True) for way in ways]  # noqa: PLW1510
    assert all(one.returncode == 0 for one in found), found[-1].stderr
    assert len({one.stdout for one in found}) == 1


@pytest.mark.skipif(fast_casts.numkong() is None, reason="numkong is not installed")
def test_a_kernel_that_differs_is_not_used() -> None:
    f32, bf16, f16 = (DTYPES[name] for name in ("F32", "BF16", "F16"))
    assert agrees(Kernel("float32", "bfloat16", "both", 0x7F80), f32, bf16)
    assert not agrees(Kernel("float32", "bfloat16", "neither"), f32, bf16)
    assert not agrees(Kernel("bfloat16", "bfloat16", "in", 0x7C00), f16, bf16)


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize(
    ("source", "target"), [*_PAIRS, *((a, b) for a, b in permutations(sorted(CASTABLE), 2) if a == "F64")]
)
def test_a_cast_takes_no_more_memory_than_it_says(source: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one makes a table and compares a kernel; every block holds what is not finite."""
    monkeypatch.setattr(fast_casts, "_TABLES", {})
    monkeypatch.setattr(fast_casts, "_TRUSTED", {})
    patterns = every_value(DTYPES[source]) if source != "F64" else every_value(DTYPES["F32"]).astype(np.float64)
    values = np.resize(patterns, 700_000)
    execute(Cast(DTYPES[source], DTYPES[target]), [values])


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize(("source", "target"), _PAIRS)
def test_overflow_is_counted(source: str, target: str) -> None:
    values = every_value(DTYPES[source])
    out = np.empty(values.shape, numpy_dtype(DTYPES[target]))
    counted = Cast(DTYPES[source], DTYPES[target]).apply(None, [values], 0, out)
    wide = values.astype(np.float64)
    if target == "F8_E4M3":  # saturates: whatever lies above the tie between 448 and the next step, 480
        assert counted == np.count_nonzero(np.abs(wide) > 464)
    else:
        assert counted == np.count_nonzero(np.isfinite(wide) & ~np.isfinite(out.astype(np.float64)))


@pytest.mark.parametrize("target", ["F16", "BF16", "F8_E5M2", "F32"])
@given(seed=st.integers(0, 2**32 - 1))
def test_float64_is_rounded_once_to_the_nearest_even(target: str, seed: int) -> None:
    """Ties of the target, and one float64 step beside them: where passing through float32 goes wrong."""
    dtype = DTYPES[target]
    rng = np.random.default_rng(seed)
    low = every_value(dtype) if dtype.itemsize <= 2 else rng.integers(0, 2**31, 5000, np.uint32).view(np.float32)
    low = np.abs(low[np.isfinite(low.astype(np.float64))])
    bits = low.view(f"u{dtype.itemsize}")
    above = (bits + 1).astype(bits.dtype).view(low.dtype)
    usable = np.isfinite(above.astype(np.float64))
    low64, above64 = low[usable].astype(np.float64), above[usable].astype(np.float64)
    ties = (low64 + above64) / 2  # exact: one bit more than the target has
    even = np.where(bits[usable] & 1, above64, low64)
    cases = [(ties, even), (np.nextafter(ties, np.inf), above64), (np.nextafter(ties, -np.inf), low64)]
    for values, expected in cases:
        out = np.empty(values.shape, numpy_dtype(dtype))
        Cast(DTYPES["F64"], dtype).apply(None, [values], 0, out)
        assert np.array_equal(out.astype(np.float64), expected)


def test_spellings_of_float_types() -> None:
    for text in ("bfloat16", "bf16", "BF16", "torch.bfloat16"):
        assert float_dtype(text) is DTYPES["BF16"]
    assert float_dtype("float8_e4m3fn") is DTYPES["F8_E4M3"]
    for text in ("int8", "bfloat", "", "I64"):
        with pytest.raises(UsageError, match="not a float type") as caught:
            float_dtype(text)
        assert caught.value.code == "unknown-dtype"
