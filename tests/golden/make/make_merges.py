"""Makes merges/: small float32 tensors and what mergekit 0.1.5 merges them to.

    python make_merges.py --out DIR

needs torch 2.13.0, safetensors and `pip install --no-deps mergekit==0.1.5`. Each file holds the inputs (`base`, `a`,
`b`, `c`) and one result a method; `cases` in the metadata says, as JSON, with which parameters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file

SHAPE = (23, 29)
CASES = {
    "task_arithmetic": {"method": "task_arithmetic", "weights": [0.5, 0.7, -0.2]},
    "ties_half": {"method": "ties", "weights": [0.5, 0.3, 0.9], "density": 0.5},
    "ties_few": {"method": "ties", "weights": [1.0, 1.0, 1.0], "density": 0.1, "lambda": 0.7},
    "ties_least": {"method": "ties", "weights": [1.0, 1.0, 1.0], "density": 0.0001},
    "ties_all": {"method": "ties", "weights": [1.0, -0.5, 1.0], "density": 1.0},
    "ties_none": {"method": "ties", "weights": [1.0, 1.0, 1.0], "density": 0.0},
    "dare_all": {"method": "dare_linear", "weights": [0.5, 0.3, 0.9], "density": 1.0},
    "dare_ties_all": {"method": "dare_ties", "weights": [0.5, 0.3, 0.9], "density": 1.0},
    "slerp": {"method": "slerp", "t": 0.3},
    "slerp_parallel": {"method": "slerp", "t": 0.3, "inputs": ["base", "near"]},
    "slerp_opposite": {"method": "slerp", "t": 0.3, "inputs": ["base", "opposite"]},
    "slerp_zero": {"method": "slerp", "t": 0.25, "inputs": ["a", "zero"]},
    "linear": {"method": "linear", "weights": [0.2, 0.3, 0.5]},
    "linear_mean": {"method": "linear", "weights": [1.0, 1.0, 1.0]},
}


def inputs() -> dict[str, torch.Tensor]:
    """Returns a base and models; no two magnitudes of a delta are equal, so that every sort agrees."""
    torch.manual_seed(20)
    base = torch.randn(SHAPE) * 0.05
    found = {"base": base, **{name: base + torch.randn(SHAPE) * 0.02 for name in "abc"}}
    for name in "abc":
        size = (found[name] - base).abs().reshape(-1)
        assert len(size.unique()) > 0.99 * len(size)
    found["near"] = base * 1.5 + 1e-5 * torch.randn(SHAPE)
    found["opposite"] = -0.5 * base
    found["zero"] = torch.zeros(SHAPE)
    return found


def merge(case: dict[str, object], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns what mergekit makes of the tensors, its own defaults where the case says nothing."""
    method = case["method"]
    if method == "slerp":
        pair = [tensors[name] for name in case.get("inputs", "ab")]
        return merge_tensors(pair, method, base_index=0, parameters={"t": case["t"]})
    models = [tensors[name] for name in "abc"]
    if method == "linear":
        return merge_tensors(models, method, parameters={"weight": case["weights"]})
    shared = {name: case[name] for name in ("lambda", "density") if name in case}
    weight = dict(enumerate(case["weights"], 1))
    return merge_tensors([tensors["base"], *models], method, base_index=0, parameters={"weight": weight, **shared})


def main() -> None:
    """Writes ``merges/float32.safetensors``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tensors = inputs()
    results = {f"result.{name}": merge(case, tensors).contiguous() for name, case in CASES.items()}
    save_file({**tensors, **results}, out / "float32.safetensors", {"cases": json.dumps(CASES), "mergekit": "0.1.5"})


if __name__ == "__main__":
    main()
