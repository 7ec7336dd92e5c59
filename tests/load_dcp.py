"""Loads a distributed checkpoint into modules sharded by FSDP2: ``python load_dcp.py CHECKPOINT WORLD OUT``.

Ranks over gloo; rank 0 saves the whole state dict that they hold together. ``model`` is the root of the checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def model() -> nn.Module:
    """Rows that two ranks cannot share evenly, fewer rows than ranks, a buffer, a 0-d one."""
    made = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1, bias=False), nn.LayerNorm(3))
    made[0].register_buffer("ids", torch.arange(4))
    made[2].register_buffer("scale", torch.tensor(2.5))
    return made


def load(folder: Path, rank: int, world: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    made = model()
    for layer in made:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    state = {"model": get_model_state_dict(made)}
    for tensor in state["model"].values():
        tensor.zero_()
    dcp.load(state, checkpoint_id=folder)
    whole = get_model_state_dict(made, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, out)
    dist.destroy_process_group()


def main(folder: Path, world: int, out: Path) -> None:
    """Forks the ranks, so that torch is imported once, and fails if one of them does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=load, args=(folder, rank, world, out)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
