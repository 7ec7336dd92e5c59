"""Every arithmetic op by its contract alone, without the engine: what it says of itself is what it does."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from shardmerge.dtypes import DTYPES
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.contract import Arithmetic
from shardmerge.ops.registry import OPS
from shardmerge.ops.vocabulary import NewRows
from tests.op_harness import execute, meta_of, run, same_bits
from tests.test_op_laws import CASES, build

SIZE = 150
COMPUTED = [(kind, index) for kind, cases in CASES.items() for index in range(len(cases(2))) if kind != "cast"]


@cache
def case(kind: str, index: int, size: int, *dtypes: str) -> tuple[Arithmetic, list[Array]] | None:
    found = CASES[kind](size)[index]
    op = build(OPS[kind], found.params)
    if not isinstance(op, Arithmetic):
        return None
    rng = np.random.default_rng(index)
    turn = found.dtypes or [dtypes[place % len(dtypes)] for place in range(len(found.shapes))]
    arrays = [
        rng.standard_normal(shape).astype(numpy_dtype(DTYPES[dtype]))
        for shape, dtype in zip(found.shapes, turn, strict=True)
    ]
    return op, [arrays[0]] * len(arrays) if kind == "assert_equal" else arrays


ARITHMETIC = [(kind, index) for kind, index in COMPUTED if case(kind, index, 4, "F32") is not None]


def test_every_arithmetic_op_is_here() -> None:
    named = {"lora", "dora", "new_rows", "linear", "fill", "ties", "dare", "slerp", "della", "sce", "karcher"}
    assert named <= {kind for kind, _ in ARITHMETIC}


@pytest.mark.parametrize("dtypes", [("F32",), ("BF16",), ("F16", "F32"), ("F64", "BF16")], ids="-".join)
@pytest.mark.parametrize(("kind", "index"), ARITHMETIC)
def test_tiles_are_the_whole_bit_for_bit_in_the_memory_it_says(kind: str, index: int, dtypes: tuple[str, ...]) -> None:
    """The harness itself compares bytes allocated with bytes said, for ``prepare`` and for every tile."""
    op, arrays = case(kind, index, SIZE, *dtypes)
    whole = execute(op, arrays)
    assert meta_of(whole.array) == op.infer([meta_of(array) for array in arrays])
    for tile in (1009, 8192):
        cut = execute(op, arrays, tile)
        assert same_bits(cut.array, whole.array), tile
        assert cut.overflows == whole.overflows


# Constants an op may say for buffers of numpy and of the BLAS, whatever the size of its inputs.
CONSTANT = 4 << 20


@pytest.mark.parametrize(("kind", "index"), ARITHMETIC)
def test_memory_is_not_overstated(kind: str, index: int) -> None:
    op, arrays = case(kind, index, 1000, "BF16")
    outcome = execute(op, arrays, 1 << 19)
    assert outcome.promised <= 2 * outcome.peak + CONSTANT
    assert outcome.state_promised <= 2 * outcome.state_peak + CONSTANT


@pytest.mark.parametrize("how", ["mean", "normal", "copy", "zeros"])
@pytest.mark.parametrize(("rows", "width"), [(700, 64), (300, 9001), (1000, 1), (3, 5)])
def test_new_rows_of_any_width(how: str, rows: int, width: int) -> None:
    base = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    op = NewRows(5, how, 2, 7)
    whole = run(op, [base])
    for tile in (max(1, width // 3), 3 * width + 1):
        assert same_bits(run(op, [base], tile), whole)


@pytest.mark.parametrize("tile", [None, 1, 40 * 64])
def test_dora_onto_rows_that_others_changed(tile: int | None) -> None:
    """The norm is that of the untouched rows; every byte is promised, as for each op of a mapping."""
    from shardmerge.ops.dora import DoraOnto

    rng = np.random.default_rng(0)
    shapes = ((4, 64), (80, 4), (80,), (80, 64), (80, 64))
    a, b, magnitude, untouched, base = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    found = execute(DoraOnto(0.5), (a, b, magnitude, untouched, base), tile)
    product = 0.5 * b.astype(np.float64) @ a.astype(np.float64)
    norm = np.linalg.norm(untouched + product, axis=1)
    np.testing.assert_allclose(found.array, (magnitude / norm)[:, None] * (base + product), rtol=3e-7, atol=1e-7)
    assert not found.overflows
