"""Casts a directory of safetensors files to bf16 the usual way, shard by shard: load, cast, save."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(source: str, out: str) -> None:
    """Writes each shard of ``source`` to ``out`` under its name, in bf16."""
    for shard in sorted(Path(source).glob("*.safetensors")):
        cast = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(shard).items()}
        save_file(cast, Path(out) / shard.name, metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
