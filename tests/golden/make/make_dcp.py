"""Makes the golden checkpoints of torch's distributed checkpoint, trained or cut by torch itself.

    python make_dcp.py --out DIR [--only NAME ...]

DIR/NAME has ``ckpt/``, ``case.json`` and ``truth.safetensors``: every tensor below the root, gathered by torch
(``full_tensor``) before it was saved. Ranks are forked, over gloo.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tiny_models import build
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


@dataclass
class Made:
    """What a case saves: the state, and where the model is in it."""

    state: dict[str, Any]
    root: str = "model"
    world: int = 2
    writer: Callable[[pathlib.Path], Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)


def trained(kind: str, dtype: torch.dtype, shard: Callable[[Any], Any]) -> tuple[Any, Any]:
    """A model, sharded, after two steps of AdamW on random gradients."""
    torch.manual_seed(7)
    model = shard(build(kind).to(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        for number, weight in enumerate(model.parameters()):
            if weight.requires_grad:
                weight.grad = torch.full_like(weight, 0.01 * (number + 1))
        optimizer.step()
    return model, optimizer


def by_layers(model: Any, **how: Any) -> Any:
    for layer in getattr(getattr(model, "model", None), "layers", ()):
        fully_shard(layer, **how)
    return fully_shard(model, **how)


def fsdp2(rank: int) -> Made:
    model, optimizer = trained("llama", torch.bfloat16, by_layers)
    weights, moments = get_state_dict(model, optimizer)
    return Made({"model": weights, "optim": moments, "step": 2})


def fsdp2_bag(rank: int) -> Made:
    model, _ = trained("bag", torch.float32, fully_shard)
    return Made({"model": get_model_state_dict(model)}, world=3)


def fsdp2_columns(rank: int) -> Made:
    model, _ = trained("llama", torch.float32, lambda m: fully_shard(m, shard_placement_fn=lambda p: Shard(p.ndim - 1)))
    return Made({"model": get_model_state_dict(model)})


def hsdp(rank: int) -> Made:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, _ = trained("llama", torch.float32, lambda m: by_layers(m, mesh=mesh))
    return Made({"model": get_model_state_dict(model)}, world=4)


def fsdp2_tp(rank: int) -> Made:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, _ = trained("llama", torch.bfloat16, lambda m: by_layers(tensor_parallel(m, mesh["tensor"]), mesh=mesh["data"]))
    return Made({"model": get_model_state_dict(model)}, world=4)


def tensor_parallel(model: Any, mesh: Any) -> Any:
    plan = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def tp(rank: int) -> Made:
    model, _ = trained("llama", torch.bfloat16, lambda m: tensor_parallel(m, init_device_mesh("cpu", (2,))))
    return Made({"model": get_model_state_dict(model)})


def fsdp1(rank: int) -> Made:
    model, optimizer = trained("llama", torch.float32, fsdp1_of)
    weights, moments = get_state_dict(model, optimizer)
    return Made({"model": weights, "optimizer": moments})


def fsdp1_of(model: Any, **how: Any) -> Any:
    layer = type(model.model.layers[0])
    policy = ModuleWrapPolicy({layer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True, **how)


def fsdp1_hybrid(rank: int) -> Made:
    mesh = init_device_mesh("cpu", (2, 2))
    how = {"device_mesh": mesh, "sharding_strategy": ShardingStrategy.HYBRID_SHARD}
    model, _ = trained("llama", torch.float32, lambda m: fsdp1_of(m, **how))
    return Made({"model": get_model_state_dict(model)}, world=4)


def tied(rank: int) -> Made:
    model, _ = trained("tied", torch.bfloat16, lambda m: m)
    return Made({"state_dict": model.state_dict()}, root="state_dict", world=1)


def compiled(rank: int) -> Made:
    """torch.compile, in DistributedDataParallel, whose names nobody cleaned."""
    model, _ = trained("llama", torch.float32, lambda m: m)
    model = torch.nn.parallel.DistributedDataParallel(torch.compile(model))
    return Made(model.state_dict(), root="", world=2)


def titan(rank: int) -> Made:
    """The model at the top level, beside the state of the run, as torchtitan saves it."""
    model, optimizer = trained("llama", torch.float32, by_layers)
    weights, moments = get_state_dict(model, optimizer)
    flat = {f"optimizer.{name}.{key}": value for name, one in moments["state"].items() for key, value in one.items()}
    state = {**weights, **flat, "lr_scheduler": {"last_epoch": 2}, "train_state": {"step": torch.tensor(2)}}
    return Made(state, root="", more={"expect_left_out": len(flat) + 1})


def several(rank: int) -> Made:
    """The model, its moving average, and a teacher in a list."""
    one, _ = trained("llama", torch.float32, by_layers)
    other = {name: value * 2 for name, value in get_model_state_dict(one).items()}
    state = {"model": get_model_state_dict(one), "ema": other, "teachers": [{"deep.key": torch.arange(5)}], "step": 3}
    return Made(state)


def nested(rank: int) -> Made:
    """An application's state one dict further in."""
    model, _ = trained("bag", torch.bfloat16, lambda m: m)
    return Made({"app": {"model": model.state_dict(), "seed": 5}}, root="app.model", world=1)


def not_flattened(rank: int) -> Made:
    model, _ = trained("bag", torch.float16, lambda m: m)
    more = {"planner": dcp.DefaultSavePlanner(flatten_state_dict=False)}
    return Made(model.state_dict(), root="", world=1, more=more)


def file_each(rank: int) -> Made:
    model, _ = trained("llama", torch.bfloat16, by_layers)
    state = {"model": get_model_state_dict(model)}
    return Made(state, writer=lambda path: dcp.FileSystemWriter(path, single_file_per_rank=False))


def no_collectives(rank: int) -> Made:
    model, _ = trained("llama", torch.bfloat16, by_layers)
    return Made({"model": get_model_state_dict(model)}, more={"use_collectives": False})


def views(rank: int) -> Made:
    """Parameters whose strides are not those of their shape; every element type that torch saves."""
    wide = torch.arange(15.0).reshape(5, 3)
    state = {
        "turned": wide.t(),
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "channels_last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "slice": torch.arange(20.0)[3:11],
        "expanded": torch.tensor([[1.5], [2.5]]).expand(2, 4),
        "scalar": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.empty(0, 7),
        **{str(one).removeprefix("torch."): torch.tensor([[0, 1], [1, 0]]).to(one) for one in TYPES},
    }
    return Made({"model": state}, world=1)


TYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def placements(rank: int) -> Made:
    """Uneven and empty shards along any axis of a mesh of two by two."""
    mesh = init_device_mesh("cpu", (2, 2))

    def cut(shape: tuple[int, ...], *how: Any) -> Any:
        return distribute_tensor(torch.arange(float(torch.Size(shape).numel())).reshape(shape), mesh, how)

    state = {
        "rows": cut((8, 3), Shard(0), Shard(0)), "few_rows": cut((2, 3), Shard(0), Shard(0)),
        "columns": cut((5, 7), Replicate(), Shard(1)), "both": cut((5, 7), Shard(0), Shard(1)),
        "turned_mesh": cut((5, 7), Shard(1), Shard(0)), "inner": cut((2, 5, 3, 4), Shard(1), Shard(2)),
        "replicas": cut((4, 4), Replicate(), Replicate()),
    }  # fmt: skip
    return Made({"model": state}, world=4)


CASES: dict[str, tuple[int, Callable[[int], Made]]] = {
    "fsdp2_w2_bf16": (2, fsdp2), "fsdp2_bag_w3_fp32": (3, fsdp2_bag), "fsdp2_columns_w2_fp32": (2, fsdp2_columns),
    "hsdp_2x2_fp32": (4, hsdp), "fsdp2_tp_2x2_bf16": (4, fsdp2_tp), "tp_w2_bf16": (2, tp), "fsdp1_w2_fp32": (2, fsdp1),
    "fsdp1_hybrid_2x2_fp32": (4, fsdp1_hybrid), "tied_w1_bf16": (1, tied), "compiled_ddp_w2_fp32": (2, compiled),
    "top_level_w2_fp32": (2, titan), "several_models_w2_fp32": (2, several), "nested_w1_bf16": (1, nested),
    "not_flattened_w1_fp16": (1, not_flattened), "file_each_w2_bf16": (2, file_each),
    "no_collectives_w2_bf16": (2, no_collectives), "views_w1": (1, views), "placements_2x2_fp32": (4, placements),
}  # fmt: skip


def full(value: torch.Tensor) -> torch.Tensor:
    if hasattr(value, "local_shards"):
        gathered = torch.empty(value.size(), dtype=value.dtype) if dist.get_rank() == 0 else None
        value.gather(0, gathered)
        return torch.empty(0) if gathered is None else gathered
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone().contiguous()


def below(state: Any, root: str) -> dict[str, torch.Tensor]:
    for key in root.split(".") if root else ():
        state = state[key]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and ".exp_avg" not in name}


def worker(name: str, rank: int, world: int, folder: pathlib.Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    os.chdir(folder)
    made = CASES[name][1](rank)
    path = pathlib.Path("ckpt")
    planner = made.more.get("planner")
    how = {"use_collectives": False} if "use_collectives" in made.more else {}
    writer = made.writer(path) if made.writer else None
    dcp.save(made.state, checkpoint_id=None if writer else path, storage_writer=writer, planner=planner, **how)
    truth = {key: full(value) for key, value in sorted(below(made.state, made.root).items()) if not key.startswith("optimizer.")}
    if rank == 0:
        save_file(truth, "truth.safetensors")
        about = {"name": name, "torch": torch.__version__, "world": world, "entry": "ckpt", "root": made.root}
        pathlib.Path("case.json").write_text(json.dumps({**about, "tensors": len(truth)}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")
    for name in given.only:
        folder = (given.out / name).absolute()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        world = CASES[name][0]
        ranks = [context.Process(target=worker, args=(name, rank, world, folder)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"{name}: a rank failed")
        (folder / "store").unlink(missing_ok=True)
        print(name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1024, "KB")


if __name__ == "__main__":
    main()
