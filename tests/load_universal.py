"""Loads a universal checkpoint into DeepSpeed, and takes a step: ``load_universal.py CHECKPOINT STAGE WORLD OUT``.

Ranks over gloo, on the CPU. Rank 0 saves the fp32 weights as they were loaded, and moments and weights after a step.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

import torch
from torch import nn

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "checkpoint": {"load_universal": True},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}
KINDS = ("exp_avg", "exp_avg_sq")


def model() -> nn.Module:
    """Sizes that no number of ranks divides."""
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.LayerNorm(3))


def groups(made: nn.Module) -> list[dict[str, object]]:
    """Two of them, as the Trainer of transformers makes."""
    parameters = list(made.parameters())
    return [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": 0.1},
        {"params": [one for one in parameters if one.dim() < 2], "weight_decay": 0.0},
    ]


def load(folder: Path, stage: int, rank: int, world: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # compiles C++ for a minute
    deepspeed.init_distributed(dist_backend="gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    torch.manual_seed(1)
    made = model()
    optimizer = torch.optim.AdamW(groups(made), lr=0.01)
    settings = SETTINGS | {"zero_optimization": {"stage": stage}}
    engine, _, _, _ = deepspeed.initialize(model=made, optimizer=optimizer, config=settings)
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None
    named = dict(engine.module.named_parameters())
    found = {"loaded": {name: safe_get_full_fp32_param(one).clone() for name, one in named.items()}}
    torch.manual_seed(2)
    engine.backward(engine(torch.randn(4, 7, dtype=torch.bfloat16)).square().sum())
    engine.step()
    found["stepped"] = {name: safe_get_full_fp32_param(one).clone() for name, one in named.items()}
    for kind in KINDS:
        found[kind] = {name: safe_get_full_optimizer_state(one, kind).clone() for name, one in named.items()}
    if rank == 0:
        torch.save(found, out)
    torch.distributed.barrier()


def main(folder: Path, stage: int, world: int, out: Path) -> None:
    """Forks the ranks, so that torch is imported once, and fails if one of them does."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=load, args=(folder, stage, rank, world, out)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
