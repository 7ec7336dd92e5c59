"""Normal numbers against the C library's functions, the distribution itself, and bits pinned for every machine."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from shardmerge.ops.normals import NORMAL_BYTES, cos_turns, log, normals
from tests.op_harness import measured


def words(count: int) -> np.ndarray:
    return np.random.Philox(key=[3, 5]).random_raw(count)


def test_log_is_that_of_the_c_library() -> None:
    x = np.concatenate(
        [1 - np.random.default_rng(0).random(20000), 2.0 ** -np.arange(54), 1 - 2.0 ** -np.arange(1, 54)]
    )
    expected = np.array([math.log(value) for value in x])
    assert np.all(np.abs(log(x) - expected) <= 3 * np.spacing(np.abs(expected)))
    assert log(np.ones(1))[0] == 0


def test_cosine_is_that_of_the_c_library() -> None:
    turns = np.concatenate([np.random.default_rng(0).random(20000), np.arange(64) / 64, [1 - 2.0**-53]])
    # math.cos of a rounded angle is off by the rounding: 2 pi * 2**-53.
    expected = np.array([math.cos(2 * math.pi * value) for value in turns])
    assert np.max(np.abs(cos_turns(turns) - expected)) < 2e-15
    assert cos_turns(np.array([0.0, 0.25, 0.5, 0.75])).tolist() == [1, 0, -1, 0]


def test_moments_are_those_of_the_normal_distribution() -> None:
    draws = normals(words(2_000_000))
    # Four standard errors of a million draws.
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(draws**power) - moment) < 4 * math.sqrt(spread / len(draws))
    inside = np.mean(np.abs(draws) < 1)
    assert abs(inside - math.erf(math.sqrt(0.5))) < 2e-3
    assert np.isfinite(draws).all()


def test_extreme_words_are_finite() -> None:
    extreme = np.array([0, 2**64 - 1], np.uint64)
    assert np.isfinite(normals(np.array([a for a in extreme for b in extreme for a in (a, b)], np.uint64))).all()


def test_bits_are_the_same_everywhere() -> None:
    """Words of Philox4x64-10 and IEEE operations alone: this digest holds on any processor and with any numpy."""
    draws = normals(words(200_000))
    assert hashlib.sha256(draws.astype("<f8").tobytes()).hexdigest()[:16] == "dd5cf9fe9299ff83"
    assert [value.hex() for value in draws[:2].tolist()] == ["-0x1.b36f8bc3c0c21p-3", "-0x1.aa750d29252d3p-2"]


def test_memory_is_as_said() -> None:
    raw = words(400_000)
    _, peak = measured(lambda: normals(raw))
    assert peak <= NORMAL_BYTES * 200_000 + 4096
    assert peak >= NORMAL_BYTES * 200_000 / 2
