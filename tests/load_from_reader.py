"""Loads a checkpoint or mapping into a state dict by torch's DCP: ``load_from_reader.py CHECKPOINT WORLD HOW OUT``.

HOW is ``fsdp``: parameters of a module that FSDP2 shards; ``columns``: DTensors cut along their last axis; ``plain``:
whole tensors on every rank. Ranks over gloo. Rank 0 saves the whole state dict that they hold together, and every rank
writes what it holds and read, in bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import shardmerge

State = dict[str, torch.Tensor]


def module(whole: State) -> nn.Module:
    """A module with parameters of these dotted names."""
    root = nn.Module()
    for name, tensor in whole.items():
        *path, last = name.split(".")
        node = root
        for step in path:
            if not hasattr(node, step):
                node.add_module(step, nn.Module())
            node = getattr(node, step)
        node.register_parameter(last, nn.Parameter(tensor))
    return root


def state_of(checkpoint: shardmerge.LazyCheckpoint, how: str, world: int) -> State:
    """A state dict to be filled."""
    whole = {
        name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype.torch)) for name, one in checkpoint.items()
    }  # fmt: skip
    mesh = init_device_mesh("cpu", (world,))
    if how == "fsdp":
        made = module(whole)
        fully_shard(made, mesh=mesh)
        return dict(made.state_dict())
    if how == "columns":
        return {
            name: distribute_tensor(one, mesh, [Shard(one.dim() - 1) if one.dim() else Replicate()])
            for name, one in whole.items()
        }
    return whole


def load(path: str, rank: int, world: int, how: str, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    checkpoint = shardmerge.open_checkpoint(path)
    state = state_of(checkpoint, how, world)
    dcp.load(state, storage_reader=checkpoint.storage_reader())
    held = sum(one.to_local().nbytes if isinstance(one, DTensor) else one.nbytes for one in state.values())
    read = next(iter(checkpoint.values()))._reader._pool.bytes_read
    Path(f"{out}.{rank}.json").write_text(json.dumps({"held": held, "read": read}))
    whole = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in state.items()}
    if rank == 0:
        torch.save(whole, out)
    dist.destroy_process_group()


def main(path: str, world: int, how: str, out: Path) -> None:
    """Forks the ranks, so that torch is imported once, and fails if one of them does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=load, args=(path, rank, world, how, out)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
