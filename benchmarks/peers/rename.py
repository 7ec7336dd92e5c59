"""Renames the tensors of a model the usual way: load all, build a dictionary, save all."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main(source: str, out: str) -> None:
    """Copies the shards in ``source`` to one file in ``out`` with ``model.`` replaced by ``transformer.``."""
    state = {}
    for shard in sorted(Path(source).glob("*.safetensors")):
        state.update(load_file(shard))
    renamed = {
        f"transformer.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in state.items()
    }
    Path(out).mkdir()
    save_file(renamed, Path(out) / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
