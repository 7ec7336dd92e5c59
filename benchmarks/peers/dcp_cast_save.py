"""Makes a bf16 model of a distributed checkpoint the usual way: torch's converter, load, cast, save."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def main(source: str, out: str) -> None:
    """Writes the state dict under ``model`` as one safetensors file."""
    Path(out).mkdir(exist_ok=True)
    whole = Path(out) / "whole.pt"
    dcp_to_torch_save(source, whole)
    state = torch.load(whole)["model"]
    whole.unlink()
    cast = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    save_file(cast, Path(out) / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
