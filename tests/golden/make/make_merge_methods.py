"""Makes merges/methods.safetensors: small tensors, and what mergekit 0.1.5 merges them to with every method it has.

    python make_merge_methods.py --out DIR

needs torch 2.13.0, safetensors and `pip install --no-deps mergekit==0.1.5`. Inputs are `F32.base`, `F32.a`, ... and the
same rounded to bfloat16, `BF16.base`, ...; `v.` in front are vectors. A result is called `TYPE.case.work`: what mergekit
makes of inputs of TYPE when it works in their own type (`own`) or in float64 (`wide`). `cases` in the metadata says, as
JSON, with which parameters. Methods that draw random numbers are here where nothing is left to chance, and besides
`della.kept`, how many elements of each rank they leave in 4,000 rows of ten, and `dare.l1` of `dare.delta`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file

SHAPE, VECTOR = (12, 10), (17,)
BASED = {"weight": [0.5, 0.3, 0.9]}
CASES = {
    "task_normalized": {"method": "task_arithmetic", **BASED, "normalize": True, "lambda": 0.7},
    "ties_each": {"method": "ties", **BASED, "density": [0.2, 0.5, 1.0]},
    "ties_plain": {"method": "ties", **BASED, "density": 0.4, "normalize": False, "int8_mask": True},
    "ties_rescaled": {"method": "ties", **BASED, "density": 0.4, "rescale": True, "lambda": 1.5},
    "breadcrumbs": {"method": "breadcrumbs", **BASED, "density": 0.5, "gamma": 0.1},
    "breadcrumbs_few": {"method": "breadcrumbs", **BASED, "density": 0.95, "gamma": 0.3},
    "breadcrumbs_each": {"method": "breadcrumbs", **BASED, "density": [0.3, 1.0, 0.7], "gamma": [0.2, 0.2, 0.01]},
    "breadcrumbs_ties": {"method": "breadcrumbs_ties", **BASED, "density": 0.5, "gamma": 0.1, "rescale": True},
    "della_all": {"method": "della", **BASED, "density": 1.0},
    "della_linear_all": {"method": "della_linear", **BASED, "density": 1.0},
    "dare_normalized": {"method": "dare_linear", **BASED, "density": 1.0, "normalize": True},
    "sce": {"method": "sce"},
    "sce_some": {"method": "sce", "select_topk": 0.4},
    "ram": {"method": "ram", "epsilon": 0.01},
    "ramplus_tl": {"method": "ramplus_tl", "epsilon": 0.01},
    "model_stock": {"method": "model_stock"},
    "model_stock_rows": {"method": "model_stock", "filter_wise": True},
    "nearswap": {"method": "nearswap", "t": 0.01, "models": "a"},
    "arcee_fusion": {"method": "arcee_fusion", "models": "a"},
    "nuslerp": {"method": "nuslerp", "weight": [0.3, 0.9], "models": "ab", "base": False},
    "nuslerp_rows": {"method": "nuslerp", "weight": [0.3, 0.9], "models": "ab", "base": False, "nuslerp_flatten": False},
    "nuslerp_columns": {
        "method": "nuslerp", "weight": [0.3, 0.9], "models": "ab", "base": False,
        "nuslerp_flatten": False, "nuslerp_row_wise": True,
    },
    "nuslerp_base": {"method": "nuslerp", "weight": [1.0, -1.0], "models": "ab"},
    "nuslerp_base_rows": {"method": "nuslerp", "weight": [0.3, 0.9], "models": "ab", "nuslerp_flatten": False},
    "multislerp": {"method": "multislerp", **BASED, "base": False},
    "multislerp_base": {"method": "multislerp", **BASED},
    "multislerp_plain": {"method": "multislerp", **BASED, "normalize_weights": False},
    "karcher": {"method": "karcher", "base": False},
    "karcher_steps": {"method": "karcher", "base": False, "max_iter": 2, "tol": 1e-9},
}  # fmt: skip
PER_MODEL = ("weight", "density", "gamma", "epsilon")
NOT_PASSED = ("method", "models", "base")
ON_VECTORS = ("nuslerp_rows", "nuslerp_columns", "model_stock_rows", "arcee_fusion", "breadcrumbs")


def inputs() -> dict[str, torch.Tensor]:
    """Returns a base and three models, far enough from it for their angles to be wide."""
    torch.manual_seed(20)
    found = {}
    for prefix, shape in (("", SHAPE), ("v.", VECTOR)):
        base = torch.randn(shape) * 0.05
        found |= {f"{prefix}base": base, **{f"{prefix}{name}": base + torch.randn(shape) * 0.02 for name in "abc"}}
    return found


def merge(case: dict[str, object], tensors: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    """Returns what mergekit makes of the tensors."""
    names = [*(["base"] if case.get("base", True) else []), *case.get("models", "abc")]
    given = {}
    for name, value in case.items():
        if name in PER_MODEL and isinstance(value, list):
            given[name] = dict(enumerate(value, len(names) - len(value)))
        elif name not in NOT_PASSED:
            given[name] = value
    picked = [tensors[prefix + name] for name in names]
    return merge_tensors(picked, case["method"], base_index=0 if case.get("base", True) else None, parameters=given)


def main() -> None:
    """Writes ``methods.safetensors``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    written: dict[str, torch.Tensor] = {}
    for word, tensors in (("F32", inputs()), ("BF16", rounded(inputs()))):
        written |= {f"{word}.{name}": tensor for name, tensor in tensors.items()}
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        for name, case in CASES.items():
            for prefix in ("", "v.") if name in ON_VECTORS else ("",):
                written[f"{word}.{prefix}{name}.own"] = merge(case, tensors, prefix).contiguous()
                written[f"{word}.{prefix}{name}.wide"] = merge(case, wide, prefix).contiguous()
    written |= drawn()
    save_file(written, out / "methods.safetensors", {"cases": json.dumps(CASES), "mergekit": "0.1.5"})


def drawn() -> dict[str, torch.Tensor]:
    """Returns what della keeps of rows whose elements grow to the right, and a delta that dare dropped and rescaled."""
    torch.manual_seed(21)
    rows = torch.arange(1.0, 11.0).repeat(4000, 1)
    model = {"weight": {1: 1.0}, "density": {1: 0.5}}
    nothing = torch.zeros_like(rows)
    ranked = {**model, "epsilon": {1: 0.2}, "rescale": False}
    left = merge_tensors([nothing, rows], "della_linear", base_index=0, parameters=ranked)
    delta = torch.randn(SHAPE)
    dropped = merge_tensors([torch.zeros(SHAPE), delta], "dare_linear", base_index=0, parameters=model)
    return {"della.kept": (left != 0).sum(0), "dare.delta": delta, "dare.l1": dropped}


def rounded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns them in bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
