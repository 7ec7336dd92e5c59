"""Plans whose text and id are kept in ``golden/plans``: ``python -m tests.golden_plans`` writes them anew.

A change of either is a change of what a plan means, and takes another ``SCHEMA``: a plan that was written down, or
parts that were made, must not be taken up by code that reads them otherwise.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.plan.writing import plan_lines
from tests.conftest import GOLDEN

FOLDER = GOLDEN / "plans"
# Not of whole seconds: such a time would count with the path.
_TIME = 1_700_000_000_123_456_789

_MODEL = {
    "embed.weight": (6, 4), "layers.0.q.weight": (4, 4), "layers.0.k.weight": (2, 4), "layers.0.v.weight": (2, 4),
    "layers.1.q.weight": (4, 4), "layers.1.k.weight": (2, 4), "layers.1.v.weight": (2, 4), "norm.bias": (4,),
}  # fmt: skip
_LORA = {"layers.0.q.A": (2, 4), "layers.0.q.B": (4, 2)}

MAPPINGS = {
    "moves": """\
shardmerge: 1
sources: {m: model.safetensors}
output: {path: out, shard_size: 200B}
tensors:
  tok.weight: m:embed.weight
  head.weight: {op: transpose, of: "m:embed.weight"}
  h.{i}.qk.weight: {op: concat, of: ["m:layers.{i}.q.weight", "m:layers.{i}.k.weight"], dim: 0}
  h.{i}.v.weight: m:layers.{i}.v.weight
  first.rows: {op: slice, of: "m:layers.0.q.weight", dim: 0, start: 1, stop: 3}
drop: ["m:norm.{rest...}"]
""",
    "arithmetic": """\
shardmerge: 1
sources: {m: model.safetensors, a: lora.safetensors}
output: {path: out, dtype: bfloat16}
tensors:
  q.weight: {op: lora, a: "a:layers.0.q.A", b: "a:layers.0.q.B", of: "m:layers.0.q.weight", scale: 0.1}
  sum.weight: {op: linear, of: ["m:layers.0.k.weight", "m:layers.1.k.weight"], weights: [0.3, 0.7]}
  ones.bias: {op: fill, shape: [3], value: 1, dtype: float32}
  norm.bias: m:norm.bias
drop: ["m:embed.weight", "m:layers.{i}.v.weight", "m:layers.1.q.weight"]
""",
    "torch": """\
shardmerge: 1
sources: {m: model.safetensors}
output: {path: out, format: bin, dtype: float16}
tensors: {"{rest...}": "m:{rest...}"}
""",
}  # fmt: skip


def text_of(name: str, folder: Path) -> str:
    """Returns the text of a plan made in a folder, as if that were ``/models``, without its last line."""
    for file, shapes in (("model", _MODEL), ("lora", _LORA)):
        path = folder / f"{file}.safetensors"
        save_file({one: np.ones(shape, np.float32) for one, shape in shapes.items()}, path)
        os.utime(path, ns=(_TIME, _TIME))
    mapping = folder / "mapping.yaml"
    mapping.write_text(MAPPINGS[name])
    prepared = api.prepare(mapping, sm.Options())
    *lines, _ = plan_lines(prepared.plan, str(prepared.out))
    return "".join(lines).replace(str(folder), "/models")


def main() -> None:
    """Writes all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in MAPPINGS:
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"{name}.txt").write_text(text_of(name, Path(folder).resolve()))


if __name__ == "__main__":
    main()
