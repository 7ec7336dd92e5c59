"""The checkpoint that is converted: a safetensors file of fp32 weights, of any size, written block by block."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

MATRIX = (2048, 1024)
VECTOR = (1024,)
LAYER_BYTES = 4 * (2 * MATRIX[0] * MATRIX[1] + VECTOR[0])

# Every name changes, no value does.
MAPPING = """\
shardmerge: 1
sources: {src: model.safetensors}
tensors:
  transformer.{rest...}: "src:model.{rest...}"
"""


def write_checkpoint(folder: Path, nbytes: int) -> int:
    """Writes ``model.safetensors`` and ``mapping.yaml``, and returns the bytes of its tensors: at most ``nbytes``.

    The values are normal, 0.02 wide like real weights, and repeat from tensor to tensor; they take 8 MiB of memory.
    """
    layers = max(nbytes // LAYER_BYTES, 1)
    shapes = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in (("mlp.up", MATRIX), ("mlp.down", MATRIX), ("norm", VECTOR))
    }
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    cursor = 0
    for name, shape in shapes.items():
        end = cursor + 4 * int(np.prod(shape))
        fields[f"{name}.weight"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [cursor, end]}
        cursor = end
    header = json.dumps(fields).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    values = np.random.default_rng(0).standard_normal(MATRIX, np.float32) * np.float32(0.02)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for shape in shapes.values():
            file.write(values[: shape[0] if len(shape) == 2 else 1].data)
    (folder / "mapping.yaml").write_text(MAPPING, "utf-8")
    return cursor
