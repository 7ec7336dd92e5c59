"""Casts against torch, on every bit pattern where there are few enough, and against exact rounding for float64."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.dtypes import DTYPES, DType, float_dtype
from shardmerge.errors import UsageError
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.casts import CASTABLE, Cast

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

_PAIRS = [(a, b) for a, b in permutations(sorted(CASTABLE), 2) if a != "F64"]


def every_value(dtype: DType) -> Array:
    """All patterns of 8 and 16 bits; of float32 the 65,536 high halves with the low halves around each tie."""
    if dtype.itemsize <= 2:
        return np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(numpy_dtype(dtype))
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    lows = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    return np.concatenate([high | low for low in lows]).astype(np.uint32).view(np.float32)


def torch_cast(values: Array, source: DType, target: DType) -> Array:
    tensor = torch.from_numpy(values.view(np.uint8)).view(getattr(torch, source.torch))
    cast = tensor.to(getattr(torch, target.torch))
    return cast.view(torch.uint8).numpy().view(numpy_dtype(target))


@pytest.mark.parametrize(("source", "target"), _PAIRS)
def test_every_cast_has_the_bits_of_torch(source: str, target: str) -> None:
    values = every_value(DTYPES[source])
    out = np.empty(values.shape, numpy_dtype(DTYPES[target]))
    Cast(DTYPES[source], DTYPES[target]).apply(None, [values], 0, out)
    expected = torch_cast(values, DTYPES[source], DTYPES[target])
    nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(nan, np.isnan(out.astype(np.float32)))
    width = f"u{DTYPES[target].itemsize}"
    assert np.array_equal(expected.view(width)[~nan], out.view(width)[~nan])


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
