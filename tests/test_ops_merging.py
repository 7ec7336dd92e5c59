"""Merges against mergekit 0.1.5 (tests/golden/make/make_merges.py) and against the papers' formulas in torch."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from shardmerge.compose import compose
from shardmerge.errors import MappingError
from shardmerge.execute.gather import Assembler
from shardmerge.ops.parts import PART, parts
from shardmerge.ops.selection import keys, select
from shardmerge.plan.memory import has_state
from shardmerge.storage.reading import FilePool
from tests.conftest import GOLDEN
from tests.made import built, check_cuts, check_peak, filled, made, stored

torch = pytest.importorskip("torch")

WITH_BASE = ("task_arithmetic", "ties", "dare")
OURS = {
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {}),
    "dare_linear": ("dare", {"sign_consensus": False}),
    "dare_ties": ("dare", {"sign_consensus": True}),
    "slerp": ("slerp", {}),
    "linear": ("linear", {}),
}


def goldens() -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    with safe_open(GOLDEN / "merges" / "float32.safetensors", "np") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


CASES, TENSORS = goldens()


@pytest.mark.parametrize("name", CASES)
def test_merges_are_those_of_mergekit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    kind, fixed = OURS[case["method"]]
    names = case.get("inputs", "ab") if kind == "slerp" else "abc"
    inputs = [TENSORS[one] for one in (*(("base",) if kind in WITH_BASE else ()), *names)]
    params = {"weights": tuple(case["weights"])} if "weights" in case else {"t": case["t"]}
    if "lambda" in case:
        params["scale"] = case["lambda"]
    if kind == "linear":
        params["weights"] = tuple(w / sum(case["weights"]) for w in case["weights"])  # mergekit normalises
    params |= {"density": case["density"]} if "density" in case else {}
    found = check_cuts(made(built(kind, **fixed, **params), tmp_path, inputs))
    # Not bit for bit: torch adds in another order, and mergekit's slerp takes its norms in float32.
    np.testing.assert_allclose(found, TENSORS[f"result.{name}"], rtol=1e-5, atol=2e-7)


# --- the papers' formulas, in float64 ---


def models(shape: tuple[int, ...], count: int, dtype: str = "float32", seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    base = random.standard_normal(shape) * 0.05
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    return [base.astype(kind), *((base + random.standard_normal(shape) * 0.02).astype(kind) for _ in range(count))]


def kept_by_sorting(delta: np.ndarray, density: float) -> np.ndarray:
    """A stable sort: the lowest index among equals."""
    flat = np.abs(delta).astype(np.float32).reshape(-1)
    count = max(1, int(density * flat.size))
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    return mask.reshape(delta.shape)


def merged(base: np.ndarray, deltas: list[np.ndarray], weights: tuple[float, ...], *, normalize: bool) -> np.ndarray:
    """Elect sign and disjoint merge (Yadav et al., 2023, 3.2 and 3.3), weighted as mergekit does, in float64."""
    wide = torch.stack([torch.from_numpy(d).double() * w for d, w in zip(deltas, weights, strict=True)])
    sign = torch.where(wide.sum(0) >= 0, 1.0, -1.0)
    agrees = torch.sign(wide) == sign
    divisor = (agrees * torch.tensor(weights).double().reshape(-1, *[1] * base.ndim)).sum(0)
    total = (wide * agrees).sum(0)
    return (
        torch.from_numpy(base).double() + (total / torch.where(divisor == 0, 1, divisor) if normalize else total)
    ).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("density", [0.0003, 0.2, 0.77])
def test_ties_keeps_exactly_the_largest(dtype: str, density: float, tmp_path: Path) -> None:
    """Over several blocks; bfloat16 deltas have many equal magnitudes at the threshold."""
    inputs = models((3, 60_001), 2, dtype)
    weights = (0.5, 1.25)  # exact in float32: otherwise the sign of a sum near 0 hangs on rounding
    wide = [one.astype(np.float32) for one in inputs]
    deltas = [model - wide[0] for model in wide[1:]]
    trimmed = [d * kept_by_sorting(d, density) for d in deltas]
    entry = made(built("ties", density=density, weights=weights), tmp_path, inputs)
    found = check_cuts(entry)
    np.testing.assert_allclose(found, merged(wide[0], trimmed, weights, normalize=True), rtol=1e-5, atol=1e-7)
    one = filled(made(built("ties", density=density), tmp_path, inputs[:2]))
    assert np.array_equal(one, wide[0] + deltas[0] * kept_by_sorting(deltas[0], density))
    assert has_state(entry)


@given(data=st.data())
def test_selection_is_that_of_a_stable_sort(data: st.DataObject) -> None:
    """Few different values over more than one block, so that the threshold has equals on both sides of a border."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    numel = data.draw(st.sampled_from([1, 2, 100, PART, PART + 1, 2 * PART + 7]))
    levels = data.draw(st.sampled_from([1, 3, 1000, 10**6]))
    scale = data.draw(st.sampled_from([1e-42, 1e-3, 1.0]))
    values = (random.integers(-levels, levels + 1, numel) * scale).astype(np.float32)
    if data.draw(st.booleans()):
        values[random.integers(0, numel, 3)] = [np.inf, -np.inf, 3e38]
    count = data.draw(st.integers(1, numel))
    (kept,) = select(lambda _: ((part.start, 0, keys(values[part])) for part in parts(numel)), [count], numel)
    expected = np.zeros(numel, bool)
    expected[np.argsort(-np.abs(values), kind="stable")[:count]] = True
    assert np.array_equal(kept.mask(keys(values), 0), expected)
    cut = data.draw(st.integers(0, numel))
    halves = [kept.mask(keys(values[:cut]), 0), kept.mask(keys(values[cut:]), cut)]
    assert np.array_equal(np.concatenate(halves), expected)


def test_dare_draws_by_place_seed_salt_and_model(tmp_path: Path) -> None:
    inputs = models((5, 40_000), 2)
    op = built("dare", density=0.3, weights=(0.5, 2.0), seed=7, salt="x")
    found = check_cuts(made(op, tmp_path, inputs))
    masks = [op.mask(model, 0, 200_000) for model in (0, 1)]
    dropped = [(m - inputs[0]) * mask.reshape(5, -1) for m, mask in zip(inputs[1:], masks, strict=True)]
    expected = inputs[0] + (0.5 * dropped[0] + 2.0 * dropped[1]) / 0.3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    signs = check_cuts(made(built("dare", density=0.3, seed=7, salt="x", sign_consensus=True), tmp_path, inputs))
    expected = merged(inputs[0], [d / np.float32(0.3) for d in dropped], (1.0, 1.0), normalize=False)
    np.testing.assert_allclose(signs, expected, rtol=1e-5, atol=1e-6)
    others = [built("dare", density=0.3, seed=8, salt="x").mask(0, 0, 200_000),
              built("dare", density=0.3, seed=7, salt="y").mask(0, 0, 200_000)]  # fmt: skip
    for mask in (*masks, *others):
        assert abs(mask.mean() - 0.3) < 5 * (0.21 / 200_000) ** 0.5
    for other in (masks[1], *others):
        assert abs((masks[0] == other).mean() - 0.58) < 0.01  # independent: 0.3**2 + 0.7**2
    assert op.label != built("dare", density=0.3, weights=(0.5, 2.0), seed=7, salt="y").label


def philox(key: int, counter: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), in whole numbers."""
    low = (1 << 64) - 1
    c, k = [counter >> 64 * i & low for i in range(4)], [key & low, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second & low, first >> 64 ^ c[3] ^ k[1], first & low]
        k = [(k[0] + 0x9E3779B97F4A7C15) & low, (k[1] + 0xBB67AE8584CAA73B) & low]
    return c


def test_dare_draws_what_it_documents() -> None:
    import hashlib

    op = built("dare", density=0.4, seed=3, salt="abc")
    key = int.from_bytes(hashlib.sha256(b"3:abc:1").digest()[:16], "little")
    words = [word for block in range(8) for word in philox(key, block + 1)]
    expected = [word >> 11 < int(0.4 * 2**53) for word in words]
    assert op.mask(1, 0, 32).tolist() == expected
    assert op.mask(1, 13, 10).tolist() == expected[13:23]
    assert np.array_equal(op.mask(1, 13, 20_000), op.mask(1, 0, 20_013)[13:])  # in more than one draw


def test_slerp_of_many_blocks(tmp_path: Path) -> None:
    """Shoemake's formula in float64."""
    a, b = models((2, 100_003), 1, "bfloat16")
    x, y = (one.astype(np.float64) for one in (a, b))
    angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    expected = (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(angle)
    np.testing.assert_allclose(
        check_cuts(made(built("slerp", t=0.3), tmp_path, [a, b])), expected, rtol=1e-5, atol=1e-7
    )


def test_slerp_sees_the_last_element(tmp_path: Path) -> None:
    """Which decides the angle here, and lies alone in its block."""
    a, b = np.zeros((2, (1 << 16) + 1), np.float32)
    a[0] = b[1] = 1
    a[-1] = b[-1] = 2
    angle = np.arccos(4 / 5)
    expected = (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)
    np.testing.assert_allclose(filled(made(built("slerp", t=0.3), tmp_path, [a, b])), expected, rtol=1e-6)


def test_merges_of_merges_and_casts(tmp_path: Path) -> None:
    """An input that is itself made, in float64, with a scalar and an empty tensor beside it."""
    base, a, b = models((300, 333), 2, "float64")
    inner = made(built("task_arithmetic", weights=(0.5,)), tmp_path, [base, a])
    entry = compose(built("ties", density=0.4), [stored(tmp_path, base), inner, stored(tmp_path, b)])
    assert entry.dtype.name == "F64"
    deltas = [d * kept_by_sorting(d, 0.4) for d in (base + 0.5 * (a - base) - base, b - base)]
    np.testing.assert_allclose(check_cuts(entry), merged(base, deltas, (1.0, 1.0), normalize=True), rtol=1e-12)
    for name, params in (("ties", {"density": 0.1}), ("dare", {"density": 1.0}), ("slerp", {"t": 0.5})):
        inputs = [np.float32(1.0).reshape(()), np.float32(2.0).reshape(())]
        assert filled(made(built(name, **params), tmp_path, inputs)) == (1.5 if name == "slerp" else 2.0)
        assert made(built(name, **params), tmp_path, [np.zeros((0, 3), np.float32)] * 2).pieces == ()


@pytest.mark.parametrize("kind", ["task_arithmetic", "ties", "dare", "slerp"])
def test_nan_stays_and_overflow_is_counted(kind: str, tmp_path: Path) -> None:
    params = {"ties": {"density": 0.5}, "dare": {"density": 1.0}, "slerp": {"t": 0.5}}.get(kind, {"weights": (1e30,)})
    base, model = models((40, 50), 1)
    model[3, 4] = np.nan
    assert np.isnan(filled(made(built(kind, **params), tmp_path, [base, model]))[3, 4])
    if kind == "task_arithmetic":
        assembler = Assembler(FilePool())
        inputs = [np.zeros(4, np.float32), np.array([1e10, 1.0, np.inf, 0], np.float32)]
        assembler.fill(made(built(kind, **params), tmp_path, inputs), 0, memoryview(bytearray(16)))
        assert assembler.overflowed == 1


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("task_arithmetic", {}),
        ("ties", {"density": 0.3}),
        ("dare", {"density": 0.3}),
        ("dare", {"density": 0.3, "sign_consensus": True}),
        ("slerp", {"t": 0.3}),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_no_more_memory_than_planned(kind: str, params: dict, dtype: str, tmp_path: Path) -> None:
    inputs = models((500, 777), 1 if kind == "slerp" else 3, dtype)
    inputs[-1] = inputs[-1].astype(np.float32 if dtype == "float64" else inputs[-1].dtype)
    check_peak(made(built(kind, **params), tmp_path, inputs))


BAD = [
    ("ties", {"density": 0.5}, [(2, 3)], "op-shape"),
    ("ties", {"density": 0.5}, [(2, 3), (3, 2)], "op-shape"),
    ("ties", {"density": 0.5, "weights": (1.0, 1.0)}, [(2, 3), (2, 3)], "op-value"),
    ("ties", {"density": 1.5}, [(2, 3), (2, 3)], "op-value"),
    ("dare", {"density": 0.0}, [(2, 3), (2, 3)], "op-value"),
    ("slerp", {"t": 0.5}, [(2, 3)] * 3, "op-shape"),
    ("slerp", {"t": 0.5}, [(2, 3), (3, 2)], "op-shape"),
]


@pytest.mark.parametrize(("kind", "params", "shapes", "code"), BAD)
def test_what_cannot_be_merged_is_said(kind, params, shapes, code, tmp_path: Path) -> None:
    with pytest.raises(MappingError) as caught:
        made(built(kind, **params), tmp_path, [np.zeros(shape, np.float32) for shape in shapes])
    assert caught.value.code == code


def test_integers_are_not_merged(tmp_path: Path) -> None:
    for kind, params in (("task_arithmetic", {}), ("slerp", {"t": 0.5})):
        with pytest.raises(MappingError, match="floats"):
            made(built(kind, **params), tmp_path, [np.zeros(3, np.int64)] * 2)
