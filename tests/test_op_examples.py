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


def top_left(base: Array, delta: Array) -> Array:
    """``param.data[:b.shape[0], :b.shape[1]] += b`` of llava/model/apply_delta.py."""
    made = delta.copy()
    made[: base.shape[0], : base.shape[1]] += base
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
    "task_arithmetic": (
        "x.weight",
        lambda g: g["src:base.weight"] + sum(0.5 * (g[f"src:{m}.weight"] - g["src:base.weight"]) for m in "ab"),
    ),
    "ties": ("x.weight", lambda g: ties(g["src:base.weight"], (g["src:a.weight"], g["src:b.weight"]), 0.5)),
    "slerp": ("x.weight", lambda g: slerped(g["src:a.weight"], g["src:b.weight"], 0.3)),
}


def test_every_op_has_tensors_and_a_truth() -> None:
    assert set(INPUTS) == set(OPS)
    assert set(TRUTH) | {"dare"} == set(OPS)


@pytest.mark.parametrize("name", TRUTH)
def test_the_example_makes_what_numpy_and_torch_make(name: str) -> None:
    ran = run_example(name)
    given = {f"{source}:{key}": value for source, tensors in ran.sources.items() for key, value in tensors.items()}
    target, truth = TRUTH[name]
    assert set(ran.made) == {target}
    wanted, made = truth(given), ran.made[target]
    assert made.shape == wanted.shape
    # The numbers are small enough to be exact, but where a root or a sine is taken.
    np.testing.assert_allclose(made, wanted, rtol=0 if name not in ("dora", "slerp") else 1e-6, atol=0)


def test_dare_keeps_or_drops_every_element_and_divides_by_the_density() -> None:
    """The numbers are random, so the law is checked: each delta is there twice, or not at all."""
    ran = run_example("dare")
    base, a, b = (ran.sources["src"][f"{name}.weight"] for name in ("base", "a", "b"))
    choices = [base + i * 2 * (a - base) + j * 2 * (b - base) for i in (0, 1) for j in (0, 1)]
    made = ran.made["x.weight"]
    assert all(any(made[place] == choice[place] for choice in choices) for place in range(len(made)))
    assert np.array_equal(made, run_example("dare").made["x.weight"])


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


def test_every_op_and_preset_has_a_page_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text("utf-8").split()
    for page in [*(f"ops/{name}.md" for name in OPS), *(f"presets/{n.replace('/', '-')}.md" for n in list_presets())]:
        assert page in listed
