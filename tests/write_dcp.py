"""Saves a state dict with torch's distributed checkpoint, on four ranks: ``python write_dcp.py FOLDER``.

A mesh of two by two over gloo, with what FSDP2 and tensor parallelism make: shards along one axis, another, both,
uneven ones, empty ones, replicas, and a parameter that was transposed before it was cut.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

WORLD = 4


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """The same on every rank, and no two elements of one tensor alike."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).to(dtype).reshape(shape)


def state(mesh: dist.DeviceMesh) -> dict[str, torch.Tensor]:
    """Returns what is saved, by a name that says how it is cut."""

    def cut(tensor: torch.Tensor, *placements: Placement) -> DTensor:
        return distribute_tensor(tensor, mesh, placements)

    wide = values(torch.float32, 6, 7)
    turned = values(torch.float32, 5, 8).t()
    return {
        "rows": cut(values(torch.bfloat16, 8, 6), Shard(0), Shard(0)),
        "rows.uneven": cut(values(torch.float32, 5, 3), Shard(0), Shard(0)),
        "rows.fewer_than_ranks": cut(values(torch.int64, 2, 3), Shard(0), Shard(0)),
        "columns": cut(wide, Replicate(), Shard(1)),
        "columns.of_four": cut(values(torch.float16, 3, 10), Shard(1), Shard(1)),
        "both": cut(wide, Shard(0), Shard(1)),
        "three_axes": cut(values(torch.float32, 3, 4, 5), Shard(2), Shard(0)),
        "inner_axes": cut(values(torch.uint8, 2, 5, 3, 4), Shard(1), Shard(2)),
        "replicas": cut(wide, Replicate(), Replicate()),
        "scalar": cut(torch.tensor(3.5), Replicate(), Replicate()),
        "turned": DTensor.from_local(
            turned.chunk(2)[mesh.get_local_rank(0)], mesh, [Shard(0), Replicate()], shape=turned.shape, stride=(5, 1)
        ),
        "plain": wide,
    }


def save(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    dcp.save(state(init_device_mesh("cpu", (2, 2))), checkpoint_id=folder / "checkpoint")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Forks the ranks, so that torch is imported once, and fails if one of them does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=save, args=(folder, rank)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
