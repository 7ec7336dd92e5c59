"""The tiny tensors that the examples of the ops are run on, by the pages of the ops and by their tests.

A new op needs a line here; ``make docs`` and tests/test_op_examples.py say so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

import shardmerge
from shardmerge.ops.arrays import Array
from shardmerge.ops.registry import OPS

# By source, by name.
Sources = Mapping[str, Mapping[str, Array]]


def count(*shape: int, start: int = 0) -> Array:
    """Returns start, start + 1, ... in a shape, as float32."""
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def row(*values: float) -> Array:
    """Returns a vector of float32."""
    return np.array(values, np.float32)


_MODELS = {
    "base.weight": row(1, 1, 1, 1),
    "a.weight": row(3, 0, 1.5, 1),
    "b.weight": row(2, 2, -2, 1.25),
}
_LORA = {"q.lora_A": row(1, 2, 0)[None], "q.lora_B": row(2, -4)[:, None]}

INPUTS: dict[str, Sources] = {
    "transpose": {"src": {"visual.proj": count(2, 3)}},
    "permute": {"src": {"conv.kernel": count(1, 2, 3, 4)}},
    "reshape": {"src": {"class_embedding": count(1024)}},
    "squeeze": {"src": {"cls_token": count(1, 4)}},
    "unsqueeze": {"src": {"class_embedding": count(4)}},
    "slice": {"src": {"embed.weight": count(32064, 2)}},
    "split": {"src": {"qkv.weight": count(16, 2)}},
    "chunk": {"src": {"gate_up.weight": count(4, 2)}},
    "unstack": {"src": {"layers.o_proj.weight": count(3, 2, 2)}},
    "concat": {
        "src": {"q.weight": count(8, 2), "k.weight": count(4, 2, start=100), "v.weight": count(4, 2, start=200)},
    },
    "stack": {"src": {f"experts.{e}.weight": count(2, 2, start=10 * e) for e in (0, 1, 2, 10)}},
    "grouped_split": {"src": {"grouped_qkv.weight": count(16, 1)}},
    "grouped_merge": {
        "src": {"q.weight": count(8, 1), "k.weight": count(4, 1, start=100), "v.weight": count(4, 1, start=200)}
    },
    "rotary_permute": {"src": {"wq.weight": count(16, 1)}},
    "rotary_unpermute": {"src": {"q.weight": count(16, 1)}},
    "cast": {"src": {"final.norm.weight": np.array([1, 0.3, -2], ml_dtypes.bfloat16)}},
    "dequantize": {
        "src": {
            "x.weight": np.array([[1, -2, 0.5], [8, 3, 6], [2, 4, 1]], ml_dtypes.float8_e4m3fn),
            "x.weight_scale_inv": np.array([[2, 10], [100, 0.5]], np.float32),
        },
    },
    "linear": {"src": {"a.weight": row(1, 2, 3), "b.weight": row(5, 2, -1)}},
    "add": {"src": {"base.weight": row(1, 2, 3), "delta.weight": row(0.5, 0, -1)}},
    "scale": {"src": {"x.weight": row(1, 2, 3)}},
    "assert_equal": {"src": {f"rank{r}.norm.weight": row(1, 2, 3) for r in range(2)}},
    "add_top_left": {
        "src": {"base.lm_head.weight": count(2, 2), "delta.lm_head.weight": np.full((3, 2), 10, np.float32)},
    },
    "fill": {},
    "arange": {},
    "new_rows": {"src": {"embed.weight": count(3, 2)}},
    "lora": {"adapter": _LORA, "src": {"q.weight": count(2, 3)}},
    "dora": {
        "adapter": {**_LORA, "q.magnitude": row(10, 1)},
        "src": {"q.weight": np.array([[2, 2, 0], [2, 7, 4]], np.float32)},
    },
    "lora_extract": {"src": {"base.q.weight": count(2, 3), "tuned.q.weight": 2 * count(2, 3)}},
    "task_arithmetic": {"src": _MODELS},
    "ties": {"src": _MODELS},
    "dare": {"src": _MODELS},
    "breadcrumbs": {"src": _MODELS},
    "della": {"src": _MODELS},
    "sce": {"src": _MODELS},
    "ram": {"src": _MODELS},
    "model_stock": {"src": _MODELS},
    "nearswap": {"src": {"base.weight": row(1, 1, 1, 1), "a.weight": row(3, 0.5, 1, 5)}},
    "arcee_fusion": {
        "src": {"base.weight": count(4, 4), "a.weight": count(4, 4) + np.diag(row(0, 0, 0, 3)).astype(np.float32)},
    },
    "slerp": {"src": {"a.weight": row(1, 0), "b.weight": row(0, 1)}},
    "nuslerp": {"src": {"a.weight": row(1, 0), "b.weight": row(0, 1)}},
    "multislerp": {"src": {"a.weight": row(3, 0), "b.weight": row(0, 1)}},
    "karcher": {"src": {"a.weight": row(3, 0), "b.weight": row(0, 1)}},
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """An example that was run: the tensors it was given, and those that came out."""

    sources: Sources
    made: Mapping[str, Array]


def run_example(name: str) -> Ran:
    """Runs the example of an op through shardmerge, in a temporary directory."""
    sources = INPUTS[name]
    with tempfile.TemporaryDirectory() as folder:
        return Ran(sources, run_rules(OPS[name].example, sources, Path(folder)))


def run_rules(rules: str, sources: Sources, folder: Path) -> dict[str, Array]:
    """Returns the tensors that rules (YAML, as below ``tensors:``) make."""
    # A mapping has sources, and every op that makes its elements of nothing is in one with some.
    sources = sources or {"src": {"kept": row(1)}}
    extra = "" if "src:" in rules else "\n  kept: src:kept"
    for source, tensors in sources.items():
        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / f"{source}.safetensors"
        )
    lines = "".join(f"  {source}: {source}.safetensors\n" for source in sources)
    indented = "\n".join(f"  {line}" for line in rules.splitlines())
    mapping = folder / "mapping.yaml"
    mapping.write_text(f"shardmerge: 1\nsources:\n{lines}output: out\ntensors:\n{indented}{extra}\n", "utf-8")
    result = shardmerge.run(mapping, options=shardmerge.Options(sync=False))
    made: dict[str, Array] = load_file(result.path / "model.safetensors")
    made.pop("kept", None)
    return made
