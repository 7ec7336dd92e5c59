"""Goes on with FSDP2 from a distributed checkpoint, optimizer and all: ``python resume_torch.py CHECKPOINT WORLD OUT``.

The model, its groups of parameters and the batch are those of ``load_universal``, in bfloat16 over fp32 masters; the
rates that the trainer begins with are others. Rank 0 saves the weights as loaded and after a step, its loss, and the
rates.
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.load_universal import batch, groups, model


def resume(folder: Path, rank: int, world: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    torch.manual_seed(99)
    made = model()
    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    fully_shard(made, mesh=init_device_mesh("cpu", (world,)), mp_policy=halves)
    optimizer = torch.optim.AdamW(groups(made), lr=0.5, betas=(0.5, 0.5))
    weights, moments = get_state_dict(made, optimizer)
    state = {"model": weights, "optim": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(made, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    found = {"loaded": whole(made)}
    found["rates"] = {str(n): torch.tensor(group["lr"]) for n, group in enumerate(optimizer.param_groups)}
    loss = made(batch(2)).square().sum()
    loss.backward()
    optimizer.step()
    found["loss"], found["stepped"] = {"": loss.detach()}, whole(made)
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def whole(made: nn.Module) -> dict[str, torch.Tensor]:
    found = get_model_state_dict(made, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor.clone() for name, tensor in found.items()}


def main(folder: Path, world: int, out: Path) -> None:
    """Forks the ranks, so that torch is imported once, and fails if one of them does."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=resume, args=(folder, rank, world, out)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
