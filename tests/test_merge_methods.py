"""Every merge of mergekit 0.1.5 (tests/golden/make/make_merge_methods.py) that leaves nothing to chance.

Ours works in float32 and rounds once. So it is compared with what mergekit makes in float64 of the same inputs: equal
but for the roundings of a chain of float32 operations, and in bfloat16 equal but for one rounding of the result. What
mergekit makes in the type of the tensors is nearer to it than its own roundings.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from shardmerge.errors import CheckpointError, MappingError
from shardmerge.ops.softmax import exp, softmax
from tests.conftest import GOLDEN
from tests.made import built, check_cuts, filled, made

with safe_open(GOLDEN / "merges" / "methods.safetensors", "pt") as _file:
    CASES = json.loads(_file.metadata()["cases"])
    TENSORS = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118

SIGNS = {"sign_consensus": True}
NO_SIGNS = {"sign_consensus": False, "normalize": False}
OURS = {
    "breadcrumbs_ties": ("breadcrumbs", SIGNS),
    "dare_linear": ("dare", {"rescale": "l1"}),
    "della_linear": ("della", NO_SIGNS),
    "ramplus_tl": ("ram", {"r": 0.1}),
}
RENAMED = {
    "weight": "weights", "lambda": "scale", "normalize_weights": "normalize", "filter_wise": "filter_wise",
    "nuslerp_flatten": "", "nuslerp_row_wise": "", "int8_mask": "", "method": "", "models": "", "base": "",
}  # fmt: skip
# float32 operations one behind the other, each of which may round by half of 2**-23 of its terms.
CHAIN = 16 * 2.0**-24
KEEPS_LARGEST = ("ties", "breadcrumbs")


def ours(case: dict) -> tuple[str, dict]:
    """Returns our op and its parameters."""
    name, fixed = OURS.get(case["method"], (case["method"], {}))
    params = dict(fixed)
    for key, value in case.items():
        word = RENAMED.get(key, key)
        if word:
            params[word] = tuple(value) if isinstance(value, list) else value
    if "rescale" in case:
        params["rescale"] = "l1" if case["rescale"] else "none"
    if not case.get("nuslerp_flatten", True):
        params["along"] = "columns" if case.get("nuslerp_row_wise") else "rows"
    if case["method"] in ("nuslerp", "multislerp"):
        params["base"] = case.get("base", True)
    return name, params


def array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def named(case: dict) -> list[str]:
    return [*(["base"] if case.get("base", True) else []), *case.get("models", "abc")]


def decided(case: dict, inputs: list[np.ndarray]) -> np.ndarray:
    """Where no other element has the same magnitude of a delta: mergekit's sort may take either of two equals."""
    where = np.ones(inputs[0].shape, bool)
    if case["method"].startswith(KEEPS_LARGEST):
        wide = [one.astype(np.float64) for one in inputs]
        for model in wide[1:]:
            sizes = np.abs(model - wide[0])
            times = Counter(sizes.reshape(-1).tolist())
            where &= np.vectorize(lambda size, times=times: times[size] == 1)(sizes)
    return where


EVERY = sorted(name[4:-5] for name in TENSORS if name.startswith("F32.") and name.endswith(".wide"))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", EVERY)
def test_merges_are_those_of_mergekit(name: str, dtype: str, tmp_path: Path) -> None:
    prefix = "v." if name.startswith("v.") else ""
    case = CASES[name.removeprefix("v.")]
    inputs = [array(TENSORS[f"{dtype}.{prefix}{one}"]) for one in named(case)]
    op, params = ours(case)
    found = check_cuts(made(built(op, **params), tmp_path, inputs))
    assert found.dtype == np.float32
    wide, own = (TENSORS[f"{dtype}.{name}.{work}"] for work in ("wide", "own"))
    where = decided(case, inputs)
    assert where.mean() > (0.99 if dtype == "F32" else 0.3)
    scale = max(float(np.abs(one.astype(np.float64)).max()) for one in (*inputs, wide.numpy()))
    np.testing.assert_allclose(found[where], wide.numpy()[where], rtol=0, atol=CHAIN * scale)
    # One rounding: where the two are on different sides of the middle between two numbers, they are those numbers.
    narrow = torch.from_numpy(found).bfloat16().double().numpy()
    expected = wide.bfloat16().double().numpy()
    apart = np.abs(narrow - expected)[where]
    assert (apart <= 2.0**-7 * np.abs(expected[where])).all()
    assert (apart != 0).mean() < 0.02
    # mergekit in the type of the tensors: a rounding after every operation, of terms as large as the largest.
    step = 2.0**-24 if dtype == "F32" else 2.0**-8
    unsure = OWN_MASKS if dtype == "BF16" else ()
    if not case["method"].startswith(unsure):
        np.testing.assert_allclose(found[where], own.double().numpy()[where], rtol=0, atol=60 * step * scale)


# In bfloat16 these decide by rounded numbers what is kept, so some elements are others.
OWN_MASKS = ("arcee_fusion", "sce", "ram", "ties", "breadcrumbs")


# --- what is left to chance ---


def test_della_keeps_as_many_of_each_rank_as_mergekit(tmp_path: Path) -> None:
    """Counts of 4,000 coins each, within five standard deviations of their law, for both."""
    rows = np.tile(np.arange(1, 11, dtype=np.float32), (4000, 1))
    op = built("della", density=0.5, epsilon=0.2, sign_consensus=False, normalize=False, rescale="none", seed=3)
    found = check_cuts(made(op, tmp_path, [np.zeros_like(rows), rows]))
    assert set(np.unique(found)) <= {0.0, *range(1, 11)}
    chance = 0.3 + 0.4 * np.arange(10) / 9
    for counts in ((found != 0).sum(axis=0), TENSORS["della.kept"].numpy()):
        assert (np.abs(counts - 4000 * chance) < 5 * np.sqrt(4000 * chance * (1 - chance))).all()
    other = built("della", density=0.5, epsilon=0.2, sign_consensus=False, normalize=False, rescale="none", seed=4)
    assert not np.array_equal(found, filled(made(other, tmp_path, [np.zeros_like(rows), rows])))


def test_della_of_ranks_that_a_sort_gives(tmp_path: Path) -> None:
    """Rows longer than a part; an epsilon so wide that small elements go and large ones stay almost surely."""
    base, a = np.zeros((2, 2, 70_001), np.float32)
    a[...] = np.random.default_rng(0).permuted(np.arange(1, 70_002, dtype=np.float32)[None].repeat(2, 0), axis=1)
    op = built("della", density=0.5, epsilon=0.499, sign_consensus=False, normalize=False, rescale="none")
    kept = filled(made(op, tmp_path, [base, a]), step=30_000) != 0
    assert abs(kept.mean() - 0.5) < 0.01
    low, high = kept[a < 7000], kept[a > 63_000]
    assert low.mean() < 0.1
    assert high.mean() > 0.9


def test_a_random_part_gets_the_norm_back_as_in_mergekit(tmp_path: Path) -> None:
    delta, theirs = TENSORS["dare.delta"].numpy(), TENSORS["dare.l1"].numpy()
    op = built("dare", density=0.5, rescale="l1", seed=1)
    ours_ = check_cuts(made(op, tmp_path, [np.zeros_like(delta), delta]))
    for found, mask in ((theirs, theirs != 0), (ours_, op.mask(0, 0, delta.size).reshape(delta.shape))):
        ratio = np.abs(delta).sum(dtype=np.float64) / np.abs(delta[mask]).sum(dtype=np.float64)
        np.testing.assert_allclose(found, delta * mask * ratio, rtol=1e-6)


# --- tensors of many blocks, in float64 ---


def models(shape: tuple[int, ...], count: int, dtype: str = "float32") -> list[np.ndarray]:
    random = np.random.default_rng(5)
    base = random.standard_normal(shape) * 0.05
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    return [base.astype(kind), *((base + random.standard_normal(shape) * 0.02).astype(kind) for _ in range(count))]


def test_breadcrumbs_keeps_exactly_a_band(tmp_path: Path) -> None:
    """bfloat16 has many equal magnitudes at both thresholds: the lowest index counts as the larger."""
    inputs = models((3, 50_001), 2, "bfloat16")
    op = built("breadcrumbs", density=(0.3, 0.9), gamma=(0.05, 0.2))
    wide = [one.astype(np.float32) for one in inputs]
    total = np.zeros_like(wide[0])
    for model, density, gamma in zip(wide[1:], (0.3, 0.9), (0.05, 0.2), strict=True):
        delta = (model - wide[0]).reshape(-1)
        order = np.argsort(-np.abs(delta), kind="stable")
        wanted = int(density * delta.size)
        low = max(0, delta.size - wanted - int(gamma * delta.size))
        keep = order[delta.size - low - wanted : delta.size - low]
        part = np.zeros_like(delta)
        part[keep] = delta[keep]
        total += part.reshape(total.shape)
    assert np.array_equal(check_cuts(made(op, tmp_path, inputs)), wide[0] + total)


def test_sce_of_many_blocks(tmp_path: Path) -> None:
    inputs = models((3, 50_001), 3)
    inputs[2][0] = inputs[1][0]
    inputs[3][0] = inputs[1][0]  # a third of the elements does not vary
    base, *wide = (one.astype(np.float64) for one in inputs)
    deltas = np.stack([one - base for one in wide])
    variance = np.var(deltas, axis=0).astype(np.float32)
    variance[0] = 0
    count = int(100_002 * 0.3)
    mask = np.zeros(variance.size, bool)
    mask[np.argsort(-variance.reshape(-1), kind="stable")[:count]] = True
    deltas *= mask.reshape(variance.shape)
    weights = (deltas**2).mean(axis=(1, 2))
    weights /= weights.sum()
    sign = np.where(deltas.sum(axis=0) >= 0, 1, -1)
    agrees = (np.sign(deltas) == sign) * weights[:, None, None]
    expected = base + (deltas * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1e-6)
    found = check_cuts(made(built("sce", select_topk=0.3), tmp_path, inputs))
    wrong = np.abs(found - expected) > 1e-6  # variances that float32 rounds to both sides of the threshold
    assert wrong.sum() <= 2


def test_vectors_longer_than_a_block(tmp_path: Path) -> None:
    """Rows, columns and whole tensors, whose scalar products are summed over several blocks."""
    inputs = models((3, 70_001), 2)
    base, a, b = (one.astype(np.float64) for one in inputs)
    for along, axis in (("whole", None), ("rows", 1), ("columns", 0)):
        x, y = a - base, b - base
        norms = [np.sqrt((one * one).sum(axis=axis, keepdims=True)) for one in (x, y)]
        angle = np.arccos((x * y).sum(axis=axis, keepdims=True) / norms[0] / norms[1])
        expected = base + (np.sin(0.75 * angle) * x + np.sin(0.25 * angle) * y) / np.sin(angle)
        op = built("nuslerp", weights=(3.0, 1.0), along=along, base=True)
        np.testing.assert_allclose(check_cuts(made(op, tmp_path, inputs)), expected, rtol=1e-5, atol=2e-7)


def test_fusion_takes_exact_quartiles(tmp_path: Path) -> None:
    inputs = models((5, 40_001), 1)
    base, a = (torch.from_numpy(one).double() for one in inputs)
    p, q = torch.softmax(a, -1) + 1e-8, torch.softmax(base, -1) + 1e-8
    importance = ((a - base).abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)).numpy()
    ordered = np.sort(importance, axis=None)
    low, median, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    mask = importance >= median + 1.5 * (high - low)
    found = check_cuts(made(built("arcee_fusion"), tmp_path, inputs))
    expected = np.where(mask, inputs[1], inputs[0])
    assert 0.001 < mask.mean() < 0.2
    assert (np.abs(found - expected) > 1e-7).sum() <= 2  # at the threshold, rounded to float32


def test_softmax_is_that_of_torch() -> None:
    x = np.concatenate([-np.geomspace(1e-300, 744, 20_000), [0.0, -746.0, -1e9, -np.inf]])
    np.testing.assert_allclose(exp(x), np.exp(x), rtol=5e-16, atol=5e-324)
    assert np.isnan(exp(np.array([np.nan]))).all()
    rows = np.random.default_rng(0).standard_normal((50, 300)) * 5
    np.testing.assert_allclose(softmax(rows), torch.softmax(torch.from_numpy(rows), -1).numpy(), rtol=1e-13)


# --- what is odd ---

ODD = {
    "breadcrumbs": {"density": 0.5, "gamma": 0.0}, "della": {"density": 1.0}, "sce": {}, "ram": {}, "model_stock": {},
    "nuslerp": {}, "multislerp": {}, "karcher": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_nan_stays_and_empty_tensors_and_scalars_work(kind: str, tmp_path: Path) -> None:
    inputs = models((40, 50), 2)
    inputs[1][3, 4] = np.nan
    picked = inputs[1:] if kind in ("nuslerp", "multislerp", "karcher") else inputs
    assert np.isnan(filled(made(built(kind, **ODD[kind]), tmp_path, picked))[3, 4])
    assert made(built(kind, **ODD[kind]), tmp_path, [np.zeros((0, 3), np.float32)] * len(picked)).pieces == ()
    scalar = filled(made(built(kind, **ODD[kind]), tmp_path, [np.float32(2.0).reshape(())] * len(picked)))
    np.testing.assert_allclose(scalar, 2.0, rtol=1e-6)


def test_directions_without_a_mean_are_refused(tmp_path: Path) -> None:
    x = np.ones(4, np.float32)
    half = filled(made(built("multislerp", weights=(1.0, 1.0)), tmp_path, [x, -x]))
    assert np.array_equal(half, np.zeros(4))  # as mergekit: the straight line between two
    with pytest.raises(CheckpointError) as caught:
        filled(made(built("multislerp", weights=(1.0, 0.5, 0.5)), tmp_path, [x, -x, -x]))
    assert caught.value.code == "no-mean"


@pytest.mark.parametrize(
    ("kind", "params", "count"),
    [
        ("ties", {"density": (0.5, 0.5, 0.5)}, 3),
        ("breadcrumbs", {"density": 0.5, "gamma": 1.5}, 3),
        ("della", {"density": 0.5, "epsilon": 0.5}, 3),
        ("sce", {"select_topk": 1.5}, 3),
        ("model_stock", {}, 2),
        ("nearswap", {"t": 0.1}, 3),
        ("nuslerp", {"base": True}, 2),
        ("multislerp", {"weights": (1.0,)}, 2),
        ("multislerp", {"weights": (1.0, -1.0)}, 2),
        ("karcher", {"max_iter": 0}, 2),
    ],
)
def test_what_cannot_be_merged_is_said(kind: str, params: dict, count: int, tmp_path: Path) -> None:
    with pytest.raises(MappingError) as caught:
        made(built(kind, **params), tmp_path, [np.zeros((2, 3), np.float32)] * count)
    assert caught.value.code in ("op-shape", "op-value")
