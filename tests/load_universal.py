"""Runs DeepSpeed, on ranks over gloo, on the CPU: ``load_universal.py train|load STAGE WORLD CHECKPOINT...``.

``train`` takes three steps, saves a checkpoint of ZeRO and goes on for a step. ``load`` begins with a universal
checkpoint and takes a step; of several, each begins anew. Rank 0 saves the fp32 weights before that last step and after
it, its loss, and then the moments, as ``CHECKPOINT.train.pt`` or ``CHECKPOINT.load.pt``.
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


def step(engine: object, seed: int) -> torch.Tensor:
    """The same on every rank, so that gradients are the same for any number of them. Returns the loss."""
    loss = engine(batch(seed)).square().sum()
    engine.backward(loss)
    engine.step()
    return loss.detach()


def batch(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(4, 7, dtype=torch.bfloat16)


def work(how: str, folders: list[Path], stage: int, rank: int, world: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # compiles C++ for a minute
    deepspeed.init_distributed(
        dist_backend="gloo", init_method=f"file://{folders[0]}.store", rank=rank, world_size=world
    )
    for folder in folders:
        found = run(how, folder, stage)
        if rank == 0:
            torch.save(found, f"{folder}.{how}.pt")
        torch.distributed.barrier()


def run(how: str, folder: Path, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.manual_seed(1)
    made = model()
    optimizer = torch.optim.AdamW(groups(made), lr=0.01)
    universal = {"load_universal": how == "load"}
    settings = SETTINGS | {"zero_optimization": {"stage": stage}, "checkpoint": universal}
    engine, _, _, _ = deepspeed.initialize(model=made, optimizer=optimizer, config=settings)
    if how == "load":
        path, _ = engine.load_checkpoint(str(folder))
        assert path is not None
    else:
        for seed in (10, 11, 12):
            step(engine, seed)
        engine.save_checkpoint(str(folder), exclude_frozen_parameters=False)
    named = dict(engine.module.named_parameters())
    found = {"loaded": {name: safe_get_full_fp32_param(one).clone() for name, one in named.items()}}
    found["loss"] = {"": step(engine, 2)}
    found["stepped"] = {name: safe_get_full_fp32_param(one).clone() for name, one in named.items()}
    for kind in KINDS if how == "load" else ():  # DeepSpeed has them by name only once it loaded them, below stage 3
        found[kind] = {name: safe_get_full_optimizer_state(one, kind).clone() for name, one in named.items()}
    return found


def main(how: str, stage: int, world: int, folders: list[Path]) -> None:
    """Forks the ranks, so that torch is imported once, and fails if one of them does."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(how, folders, stage, rank, world)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [Path(text) for text in sys.argv[4:]])
