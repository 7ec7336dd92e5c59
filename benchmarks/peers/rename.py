"""Renames the tensors of a safetensors file the usual way: load all, build a dictionary, save all."""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file


def main(source: str, target: str) -> None:
    """Copies ``source`` to ``target`` with ``model.`` replaced by ``transformer.``."""
    state = load_file(source)
    renamed = {
        f"transformer.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in state.items()
    }
    save_file(renamed, target, metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
