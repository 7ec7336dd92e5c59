"""The example of every op, run through shardmerge, against numpy and torch written out.

The tensors are those of the documentation (docs/tiny.py), so the numbers that its pages show are these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from docs.generate import ROOT, outdated
from docs.tiny import INPUTS, run_example, run_rules
from shardmerge.mapping.preset_files import list_presets
from shardmerge.ops.registry import OPS

Array = npt.NDArray[np.generic]
Given = Mapping[str, Array]


def rotated(rows: Array, heads: int) -> Array:
    """transformers' ``permute`` in convert_llama_weights_to_hf.py."""
    width = rows.shape[1]
    tensor = torch.from_numpy(rows)
    view = tensor.view(heads, rows.shape[0] // heads // 2, 2, width)
    return view.transpose(1, 2).reshape(rows.shape).numpy()


def unrotated(rows: Array, heads: int) -> Array:
    """The row that ``rotated`` puts at each place, looked up."""
    order = rotated(np.arange(len(rows), dtype=np.float32)[:, None], heads)[:, 0].astype(int)
    back = np.empty_like(rows)
    back[order] = rows
    return back


def grouped(qkv: tuple[Array, ...], groups: int) -> Array:
    """Row by row: the rows of group g of each, one group after the other."""
    rows = []
    for group in range(groups):
        for part in qkv:
            size = len(part) // groups
            rows += list(part[group * size : (group + 1) * size])
    return np.array(rows)


def dora(base: Array, a: Array, b: Array, magnitude: Array, scale: float) -> Array:
    """Liu et al., 2024, formula 5, with torch."""
    weight = torch.from_numpy(base) + scale * torch.from_numpy(b) @ torch.from_numpy(a)
    return (torch.from_numpy(magnitude)[:, None] * weight / weight.norm(dim=1, keepdim=True)).numpy()


def ties(base: Array, models: tuple[Array, ...], density: float) -> Array:
    """Yadav et al., 2023: trim, elect the sign, average those of that sign."""
    trimmed = []
    for model in models:
        delta = model - base
        kept = sorted(range(len(delta)), key=lambda i, delta=delta: -abs(delta[i]))[: int(density * len(delta))]
        trimmed.append([delta[i] if i in kept else 0.0 for i in range(len(delta))])
    merged = []
    for place, column in enumerate(zip(*trimmed, strict=True)):
        sign = np.sign(sum(column))
        agreeing = [value for value in column if value and np.sign(value) == sign]
        merged.append(base[place] + (sum(agreeing) / len(agreeing) if agreeing else 0))
    return np.array(merged, np.float32)


def slerped(a: Array, b: Array, t: float) -> Array:
    """Shoemake, 1985."""
    angle = np.arccos(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    made: Array = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return made


def crumbs(base: Array, models: tuple[Array, ...]) -> Array:
    """Davari and Belilovsky, 2023: of four changes the largest goes, and of the others the larger two stay."""
    merged = base.copy()
    for model in models:
        delta = model - base
        for place in sorted(range(4), key=lambda i, delta=delta: -abs(delta[i]))[1:3]:
            merged[place] += delta[place]
    return merged


def sce(base: Array, models: tuple[Array, ...]) -> Array:
    """Wan et al., 2024: select half of the elements, calculate weights, erase the minority."""
    deltas = torch.stack([torch.from_numpy(model - base) for model in models])
    variance = deltas.var(0, unbiased=False)
    chosen = variance.topk(int((variance != 0).sum() * 0.5)).indices
    deltas *= torch.zeros(4).index_fill(0, chosen, 1)
    weights = deltas.square().mean(1) / deltas.square().mean(1).sum()
    agrees = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1, -1)
    share = weights[:, None] * agrees
    return base + ((deltas * share).sum(0) / share.sum(0).clamp(min=1e-6)).numpy()


def stock(base: Array, models: tuple[Array, ...]) -> Array:
    """Jang et al., 2024, formula 7 for two models."""
    a, b = (model - base for model in models)
    cosine = np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    t = 2 * cosine / (1 + cosine)
    made: Array = t * (models[0] + models[1]) / 2 + (1 - t) * base
    return made


def top_left(base: Array, delta: Array) -> Array:
    """``param.data[:b.shape[0], :b.shape[1]] += b`` of llava/model/apply_delta.py."""
    made = delta.copy()
    made[: base.shape[0], : base.shape[1]] += base
    return made


def leading_row(delta: Array) -> Array:
    """``sqrt(s) v^T`` of the largest singular value, its largest component positive."""
    _, lengths, rows = np.linalg.svd(delta.astype(np.float64))
    made: Array = (np.sqrt(lengths[0]) * rows[:1] * np.sign(rows[0, np.abs(rows[0]).argmax()])).astype(np.float32)
    return made


# What the example makes of its tensors, which go in by name.
TRUTH: dict[str, tuple[str, Callable[[Given], Array]]] = {
    "transpose": ("visual_projection.weight", lambda g: g["src:visual.proj"].T),
    "permute": (
        "conv.weight",
        lambda g: torch.from_numpy(g["src:conv.kernel"]).permute(3, 2, 0, 1).contiguous().numpy(),
    ),
    "reshape": ("cls_token", lambda g: g["src:class_embedding"].reshape(1, 1, 1024)),
    "squeeze": ("class_embedding", lambda g: g["src:cls_token"][0]),
    "unsqueeze": ("cls_token", lambda g: g["src:class_embedding"][None]),
    "slice": ("embed.weight", lambda g: g["src:embed.weight"][:32000]),
    "split": ("q_proj.weight", lambda g: torch.from_numpy(g["src:qkv.weight"]).split([8, 4, 4])[0].numpy()),
    "chunk": ("gate_proj.weight", lambda g: torch.from_numpy(g["src:gate_up.weight"]).chunk(2)[0].numpy()),
    "unstack": ("layers.1.o_proj.weight", lambda g: g["src:layers.o_proj.weight"][1]),
    "concat": ("qkv.weight", lambda g: np.vstack([g["src:q.weight"], g["src:k.weight"], g["src:v.weight"]])),
    "stack": ("experts.weight", lambda g: np.array([g[f"src:experts.{e}.weight"] for e in (0, 1, 2, 10)])),
    "grouped_split": ("k.weight", lambda g: g["src:grouped_qkv.weight"][[4, 5, 12, 13]]),
    "grouped_merge": ("qkv.weight", lambda g: grouped((g["src:q.weight"], g["src:k.weight"], g["src:v.weight"]), 2)),
    "rotary_permute": ("q_proj.weight", lambda g: rotated(g["src:wq.weight"], 4)),
    "rotary_unpermute": ("wq.weight", lambda g: unrotated(g["src:q.weight"], 4)),
    "cast": ("final.norm.weight", lambda g: g["src:final.norm.weight"].astype(np.float32)),
    "dequantize": (
        "x.weight",
        lambda g: np.kron(g["src:x.weight_scale_inv"], np.ones((2, 2)))[:3, :3] * g["src:x.weight"].astype(np.float64),
    ),
    "linear": ("x.weight", lambda g: 0.25 * g["src:a.weight"] + 0.75 * g["src:b.weight"]),
    "add": ("x.weight", lambda g: g["src:base.weight"] + g["src:delta.weight"]),
    "scale": ("x.weight", lambda g: 0.5 * g["src:x.weight"]),
    "assert_equal": ("norm.weight", lambda g: g["src:rank0.norm.weight"]),
    "add_top_left": ("lm_head.weight", lambda g: top_left(g["src:base.lm_head.weight"], g["src:delta.lm_head.weight"])),
    "fill": ("image_newline", lambda _: np.zeros(1024, np.float32)),
    "arange": ("embeddings.position_ids", lambda _: torch.arange(577).expand((1, -1)).numpy()),
    "new_rows": (
        "embed.weight",
        lambda g: np.vstack([g["src:embed.weight"], [g["src:embed.weight"].mean(axis=0)] * 2]),
    ),
    "lora": (
        "q.weight",
        lambda g: g["src:q.weight"] + 0.5 * np.outer(g["adapter:q.lora_B"][:, 0], g["adapter:q.lora_A"][0]),
    ),
    "dora": (
        "q_proj.weight",
        lambda g: dora(g["src:q.weight"], g["adapter:q.lora_A"], g["adapter:q.lora_B"], g["adapter:q.magnitude"], 0.5),
    ),
    "lora_extract": ("q.lora_A", lambda g: leading_row(g["src:tuned.q.weight"] - g["src:base.q.weight"])),
    "task_arithmetic": (
        "x.weight",
        lambda g: g["src:base.weight"] + sum(0.5 * (g[f"src:{m}.weight"] - g["src:base.weight"]) for m in "ab"),
    ),
    "ties": ("x.weight", lambda g: ties(g["src:base.weight"], (g["src:a.weight"], g["src:b.weight"]), 0.5)),
    "slerp": ("x.weight", lambda g: slerped(g["src:a.weight"], g["src:b.weight"], 0.3)),
    "breadcrumbs": ("x.weight", lambda g: crumbs(g["src:base.weight"], (g["src:a.weight"], g["src:b.weight"]))),
    "sce": ("x.weight", lambda g: sce(g["src:base.weight"], (g["src:a.weight"], g["src:b.weight"]))),
    # Both models changed three elements, of which two are the same ones, and b alone the last.
    "ram": (
        "x.weight",
        lambda g: np.append((g["src:a.weight"] + g["src:b.weight"])[:3] / 2, g["src:b.weight"][3]),
    ),
    "model_stock": ("x.weight", lambda g: stock(g["src:base.weight"], (g["src:a.weight"], g["src:b.weight"]))),
    # Differences of 2, 0.5, 0, 4 with a t of 1: half of the way, all, all, a quarter.
    "nearswap": ("x.weight", lambda _: np.array([2, 0.5, 1, 2], np.float32)),
    # Only the last element changed, and the threshold of a tensor whose quartiles are 0 is 0.
    "arcee_fusion": ("x.weight", lambda g: g["src:a.weight"]),
    "nuslerp": ("x.weight", lambda g: slerped(g["src:a.weight"], g["src:b.weight"], 0.25)),
    # The direction of 3/4 to the right and 1/4 upwards, as long as 3/4 of 3 and 1/4 of 1.
    "multislerp": ("x.weight", lambda _: np.array([3, 1]) / np.sqrt(10) * 2.5),
    # Half way on the circle, as long as the mean of 3 and 1.
    "karcher": ("x.weight", lambda _: np.array([1, 1]) / np.sqrt(2) * 2),
}
ROUNDED = ("dora", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce")


def test_every_op_has_tensors_and_a_truth() -> None:
    assert set(INPUTS) == set(OPS)
    assert set(TRUTH) | {"dare", "della"} == set(OPS)


@pytest.mark.parametrize("name", TRUTH)
def test_the_example_makes_what_numpy_and_torch_make(name: str) -> None:
    ran = run_example(name)
    given = {f"{source}:{key}": value for source, tensors in ran.sources.items() for key, value in tensors.items()}
    target, truth = TRUTH[name]
    assert set(ran.made) == {target}
    wanted, made = truth(given), ran.made[target]
    assert made.shape == wanted.shape
    # The numbers are small enough to be exact, but where a root or a sine is taken.
    np.testing.assert_allclose(made, wanted, rtol=1e-6 if name in ROUNDED else 0, atol=0)


def test_dare_keeps_or_drops_every_element_and_divides_by_the_density() -> None:
    """The numbers are random, so the law is checked: each delta is there twice, or not at all."""
    ran = run_example("dare")
    base, a, b = (ran.sources["src"][f"{name}.weight"] for name in ("base", "a", "b"))
    choices = [base + i * 2 * (a - base) + j * 2 * (b - base) for i in (0, 1) for j in (0, 1)]
    made = ran.made["x.weight"]
    assert all(any(made[place] == choice[place] for choice in choices) for place in range(len(made)))
    assert np.array_equal(made, run_example("dare").made["x.weight"])


def test_della_keeps_or_drops_every_element_and_gives_the_norm_back() -> None:
    ran = run_example("della")
    base, a, b = (ran.sources["src"][f"{name}.weight"] for name in ("base", "a", "b"))
    made = ran.made["x.weight"]
    possible = []
    for masks in np.ndindex(*(2,) * 8):
        parts = [(model - base) * mask for model, mask in ((a, masks[:4]), (b, masks[4:]))]
        whole = [np.abs(model - base).sum() for model in (a, b)]
        parts = [d * (n / max(np.abs(d).sum(), 1e-9)) for d, n in zip(parts, whole, strict=True)]
        sign = np.where(parts[0] + parts[1] >= 0, 1, -1)
        agrees = [np.sign(part) == sign for part in parts]
        total = sum(part * agree for part, agree in zip(parts, agrees, strict=True))
        possible.append(base + total / np.maximum(agrees[0] * 1 + agrees[1], 1))
    assert any(np.allclose(made, one, rtol=1e-6) for one in possible)
    assert np.array_equal(made, run_example("della").made["x.weight"])


def test_dare_keeps_the_part_that_it_says(tmp_path: Path) -> None:
    ones = {"base.weight": np.zeros(100_000, np.float32), "a.weight": np.ones(100_000, np.float32)}
    rule = 'x.weight: {op: dare, base: "src:base.weight", of: ["src:a.weight"], density: 0.25}'
    made = run_rules(rule, {"src": ones}, tmp_path)["x.weight"]
    assert set(made.tolist()) == {0.0, 4.0}
    assert abs(made.mean() - 1) < 0.03  # five standard deviations


def test_a_cast_example_is_of_another_type() -> None:
    ran = run_example("cast")
    assert ran.sources["src"]["final.norm.weight"].dtype == ml_dtypes.bfloat16
    assert ran.made["final.norm.weight"].dtype == np.float32


# --- the generated pages ---


def test_the_generated_pages_are_current() -> None:
    """``python -m docs.generate`` writes them."""
    assert [str(path.relative_to(ROOT)) for path in outdated()] == []


def test_every_op_and_preset_is_in_its_index() -> None:
    indexes = {folder: (ROOT / "docs" / folder / "index.md").read_text("utf-8") for folder in ("ops", "presets")}
    pages = [("ops", name) for name in OPS] + [("presets", name.replace("/", "-")) for name in list_presets()]
    for folder, page in pages:
        assert f"]({page}.md" in indexes[folder]
