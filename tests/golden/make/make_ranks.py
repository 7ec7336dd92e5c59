"""Makes `ranks/*`: FSDP models of which every rank saved its own part with torch.save, as verl and accelerate do.

    python make_ranks.py --out DIR [--only fsdp2_bag_w3_fp32]

torch 2.13.0 and transformers 5.24.0, gloo, no training: the weights are random, sharded by torch's own FSDP, and saved.
The truth is the model before it was sharded; what torch itself gathers (`full_tensor`) is compared with it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from processes import spawn
from safetensors.torch import save_file
from tiny_models import Bag, llama
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

VERL = "model_world_size_{world}_rank_{rank}.pt"
ACCELERATE = "pytorch_model_fsdp_0_rank{rank}.bin"
LOCAL = "pytorch_model_fsdp_rank{rank}.bin"

State = Mapping[str, Any]


class LowRank(nn.Module):
    """A linear layer with a LoRA under the names that peft gives."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(columns, rows, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, rows, bias=False)})


class Wide(nn.Module):
    """Matrices of as many columns as ranks, and of more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(columns, 5, bias=False) for columns in (2, 4, 6))


def over(mesh: DeviceMesh, model: nn.Module, **options: Any) -> State:
    """FSDP2, every child by itself and the whole; weights that two children share stay with the whole."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    for child in () if tied else model.children():
        if not isinstance(child, nn.ModuleList):  # it has no forward
            fully_shard(child, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model.state_dict()


def line(names: str = "fsdp") -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(names,))


def square(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def fsdp2_tp(model: nn.Module) -> State:
    """Tensor parallelism first, FSDP2 over it: _StridedShard where both cut the same axis."""
    mesh = square("dp", "tp")
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
        "model.layers.0.self_attn.q_proj": ColwiseParallel(),
        "model.layers.0.self_attn.o_proj": RowwiseParallel(),
        "model.layers.0.mlp.gate_proj": ColwiseParallel(),
        "model.layers.0.mlp.up_proj": ColwiseParallel(),
        "model.layers.0.mlp.down_proj": RowwiseParallel(),
    }
    parallelize_module(model, mesh["tp"], plan)
    return over(mesh["dp"], model)


def placements(model: nn.Module) -> State:
    """DTensors by hand, on a mesh of two axes: cut twice along one axis, along two, once, never."""
    mesh = square("a", "b")
    ways = [(Shard(0), Shard(0)), (Shard(1), Shard(0)), (Replicate(), Shard(1)), (Replicate(), Replicate())]
    return {
        name: distribute_tensor(tensor, mesh, ways[index % 4] if tensor.dim() > 1 else (Replicate(), Replicate()))
        for index, (name, tensor) in enumerate(model.state_dict().items())
    }


def fsdp1(model: nn.Module, kind: StateDictType, **options: Any) -> State:
    wrapped = FSDP(model, device_id=torch.device("cpu"), **options)
    with FSDP.state_dict_type(wrapped, kind):
        return wrapped.state_dict()


Make = Callable[[nn.Module], State]
SHARDED, LOCAL_KIND = StateDictType.SHARDED_STATE_DICT, StateDictType.LOCAL_STATE_DICT
# name: world, what the model is, dtype, how it is sharded, the names of the files, in words
CASES: dict[str, tuple[int, Callable[[], nn.Module], torch.dtype, Make, str, str]] = {
    "fsdp2_w1_bf16": (1, lambda: llama(layers=1), torch.bfloat16, lambda m: over(line(), m), VERL, "one rank"),
    "fsdp2_w2_bf16": (2, llama, torch.bfloat16, lambda m: over(line(), m), VERL, "huggingface/"),
    "fsdp2_tied_w2_bf16": (2, lambda: llama(tied=True, layers=1), torch.bfloat16, lambda m: over(line(), m), VERL, "tied weights"),
    "fsdp2_lora_w2_fp32": (2, lambda: nn.Sequential(LowRank(6, 5)), torch.float32, lambda m: over(line(), m), VERL, "lora_train_meta.json"),
    "fsdp2_columns_w2_fp32": (2, Wide, torch.float32, lambda m: over(line(), m, shard_placement_fn=lambda p: Shard(1)), VERL, "Shard(1)"),
    "fsdp2_bag_w3_fp32": (3, Bag, torch.float32, lambda m: over(line(), m), VERL, "uneven and empty shards, plain buffers"),
    "fsdp1_bag_w3_fp32": (3, Bag, torch.float32, lambda m: fsdp1(m, SHARDED, use_orig_params=True), ACCELERATE, "ShardedTensor, plain buffers"),
    "fsdp1_mesh_w2_fp32": (2, Bag, torch.float32, lambda m: fsdp1(m, SHARDED, use_orig_params=True, device_mesh=line()), VERL, "FSDP1 with a device mesh: DTensor"),
    "hsdp_2x2_bf16": (4, lambda: llama(layers=1), torch.bfloat16, lambda m: over(square("ddp", "fsdp"), m), VERL, "(Replicate, Shard(0))"),
    "hsdp1_2x2_fp32": (4, Bag, torch.float32, lambda m: fsdp1(m, SHARDED, use_orig_params=True, device_mesh=square("ddp", "fsdp"), sharding_strategy=ShardingStrategy.HYBRID_SHARD), VERL, "FSDP1, HYBRID_SHARD"),
    "fsdp2_tp_2x2_bf16": (4, lambda: llama(layers=1), torch.bfloat16, fsdp2_tp, VERL, "_StridedShard, replicated norms"),
    "placements_2x2_fp32": (4, lambda: llama(layers=1), torch.float32, placements, VERL, "(Shard(0), Shard(0)) and others"),
    "local_w2_fp32": (2, lambda: llama(layers=1), torch.float32, lambda m: fsdp1(m, LOCAL_KIND), LOCAL, "LOCAL_STATE_DICT: refused"),
}  # fmt: skip


def worker(name: str) -> None:
    world, build, dtype, shard, files, words = CASES[name]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    rank = dist.get_rank()
    model = build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    truth = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = getattr(model, "config", None)
    state = shard(model)
    here = pathlib.Path(name, "actor")
    if not rank:
        here.mkdir(parents=True)
    dist.barrier()
    torch.save(state, here / files.format(world=world, rank=rank))
    for key, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if isinstance(whole, torch.Tensor) and type(whole) is torch.Tensor and not torch.equal(whole, truth[key]):
            raise RuntimeError(f"{name}: {key} is not what it was")
    dist.barrier()
    if rank == 0:
        kinds = sorted({type(tensor).__name__ for tensor in state.values()})
        describe(name, world, truth, config, kinds)
    dist.barrier()
    dist.destroy_process_group()


def describe(name: str, world: int, truth: State, config: Any, kinds: list[str]) -> None:
    """Writes what lies beside the ranks, the truth, and the record."""
    _, _, dtype, _, files, words = CASES[name]
    here = pathlib.Path(name)
    if files == VERL:
        text = json.dumps({"FSDP_version": 1 if "fsdp1" in name else 2, "world_size": world})
        (here / "actor" / "fsdp_config.json").write_text(text)
    if name == "fsdp2_w2_bf16":
        config.save_pretrained(here / "actor" / "huggingface")
    if "lora" in name:
        text = json.dumps({"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"})
        (here / "actor" / "lora_train_meta.json").write_text(text)
    if "local" not in name:
        save_file({key: tensor.contiguous().clone() for key, tensor in truth.items()}, here / "truth.safetensors")
    record = {
        "name": name,
        "torch": torch.__version__,
        "world": world,
        "dtype": str(dtype).removeprefix("torch."),
        "features": [*kinds, words],
        "entry": "actor",
        "truth_made_by": "the model before it was sharded; full_tensor() of every DTensor is equal",
    }
    (here / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    size = sum(path.stat().st_size for path in here.rglob("*") if path.is_file())
    print(f"OK {name}: {size} bytes, {kinds}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*", choices=list(CASES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    script = os.path.abspath(__file__)
    os.chdir(given.out)
    status = 0
    for name in given.only or CASES:
        shutil.rmtree(name, ignore_errors=True)
        if spawn(script, ["--out", ".", "--worker", name], CASES[name][0]):
            print(f"FAILED {name}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
