"""Writes the tensors of a model as a distributed checkpoint of FSDP: ``.metadata`` and ``.distcp`` files."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file


def main(source: str, out: str) -> None:
    """Writes what accelerate saves with SHARDED_STATE_DICT, from one process."""
    state = {}
    for shard in sorted(Path(source).glob("*.safetensors")):
        state.update(load_file(shard))
    dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(out), no_dist=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
