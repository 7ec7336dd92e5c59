"""Makes the golden distributed safetensors: models sharded by torch and saved by torch's own writer.

    python make_distributed_safetensors.py --out DIR --list
    python make_distributed_safetensors.py --out DIR [--only NAME]

torch 2.13.0 (CPU, gloo) and transformers 5.24.0. Nothing is trained: every tensor has random values of its own. The
truth is `DTensor.full_tensor()` of each tensor at the moment of the save; of types that gloo does not gather, torch.cat.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from layouts import random_tensor, randomize
from processes import spawn
from tiny_models import build

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A save: who makes the state, on how many ranks, with which settings of the writer."""

    name: str
    world: int
    state: Callable[[], State]
    features: tuple[str, ...]
    writer: Mapping[str, Any]
    parts: int = 1
    unsaved: str = ""  # a name that the mapping has and the model has not


# ---- states


def sharded(kind: str, mesh: DeviceMesh, dtype: torch.dtype, shard: Any = None) -> State:
    """A model of FSDP2 (`fully_shard`), each layer wrapped by itself."""
    torch.manual_seed(0)
    model = build(kind)
    randomize(model, kind)
    model = model.to(dtype)
    for layer in model.model.layers if kind == "llama" else ():
        fully_shard(layer, mesh=mesh, shard_placement_fn=shard)
    fully_shard(model, mesh=mesh, shard_placement_fn=shard)
    return get_model_state_dict(model)


def world_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def columns(parameter: nn.Parameter) -> Shard:
    return Shard(1 if parameter.dim() > 1 else 0)


def tensor_and_data_parallel() -> State:
    """What tensor parallelism and FSDP2 make of matrices on a mesh of two by two, by way of plain placements."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    cuts = {
        "model.embed_tokens.weight": ((19, 8), Shard(0), Shard(0)),
        "model.layers.0.self_attn.q_proj.weight": ((12, 8), Shard(1), Shard(0)),
        "model.layers.0.self_attn.o_proj.weight": ((8, 12), Shard(0), Shard(1)),
        "model.layers.0.mlp.down_proj.weight": ((5, 7), Shard(0), Shard(1)),
        "model.layers.0.experts.weight": ((3, 4, 5), Shard(2), Shard(0)),
        "model.layers.0.input_layernorm.weight": ((8,), Shard(0), Replicate()),
        "model.norm.weight": ((8,), Replicate(), Replicate()),
    }
    return {
        name: distribute_tensor(random_tensor(name, shape, torch.float32), mesh, placements)
        for name, (shape, *placements) in cuts.items()
    }


def all_types() -> State:
    """Every type that torch's writer takes, in whole rows and in columns; and tensors without elements."""
    mesh = world_mesh()
    types = [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
        torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    ]  # fmt: skip
    state: dict[str, torch.Tensor] = {}
    for kind in types:
        name = str(kind).removeprefix("torch.")
        values = (random_tensor(name, (5, 3), torch.float32) * 40).to(kind)
        for how, axis in (("rows", 0), ("columns", 1)):
            local = values.chunk(2, axis)[dist.get_rank()].contiguous()
            state[f"{name}.{how}"] = DTensor.from_local(local, mesh, [Shard(axis)], shape=(5, 3), stride=(3, 1))
    state["empty.rows"] = distribute_tensor(torch.empty(0, 3), mesh, [Shard(0)])
    state["empty.plain"] = torch.empty(2, 0)
    state["scalar"] = torch.tensor(1.5)
    return state


def alone() -> State:
    torch.manual_seed(0)
    model = build("llama")
    randomize(model, "llama")
    return model.bfloat16().state_dict()


def llama(shard: Any = None) -> State:
    return sharded("llama", world_mesh(), torch.bfloat16, shard)


def replicas() -> State:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return sharded("llama", mesh, torch.bfloat16)


# What gloo gathers; the rest goes as pickles and is put together as bytes.
CARRIED = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
DISTRIBUTED = {"save_distributed": True}
CASES = (
    Case("fsdp2_w2", 2, llama, ("an uneven vocabulary",), DISTRIBUTED),
    Case("fsdp2_bag_w3", 3, lambda: sharded("bag", world_mesh(), torch.float32),
         ("uneven and empty chunks", "buffers in the shard of one rank", "int64, bool and scalars"), DISTRIBUTED),
    Case("fsdp2_specks_w4", 4, lambda: sharded("specks", world_mesh(), torch.float32),
         ("tensors of fewer rows than ranks",), DISTRIBUTED),
    Case("fsdp2_columns_w2", 2, lambda: llama(columns), ("Shard(1) by shard_placement_fn",), DISTRIBUTED),
    Case("fsdp2_columns_w4", 4, lambda: llama(columns), ("Shard(1)", "no axis is uneven"), DISTRIBUTED),
    Case("fsdp2_parts_w3", 3, llama, ("fqn_to_index_mapping: two files a rank",), DISTRIBUTED, parts=2),
    Case("hsdp_2x2", 4, replicas, ("replicas: the chunks of a tensor lie in ranks of both",), DISTRIBUTED),
    Case("mesh_2x2", 4, tensor_and_data_parallel, ("boxes cut along two axes", "replicated tensors"), DISTRIBUTED),
    Case("types_w2", 2, all_types, ("twelve types, whole rows and columns", "tensors without elements"), DISTRIBUTED),
    Case("consolidated_w2", 2, llama, ("whole tensors and index in ckpt/, the shards in ckpt/sharded/",),
         {**DISTRIBUTED, "enable_consolidation": True}, parts=2),
    Case("unsaved_name_w2", 2, llama, ("consolidated with a name in the mapping that nobody saved",),
         {**DISTRIBUTED, "enable_consolidation": True}, unsaved="model.rotary_emb.inv_freq"),
    Case("one_rank_w1", 1, llama, ("the whole model as the shard of one rank",), DISTRIBUTED),
    Case("one_process", 1, alone, ("one process: two files and an index, all offsets 0",), {}, parts=2),
)  # fmt: skip
TRANSFORMERS = {"transformers_fsdp_w2": {"fsdp_size": 2}, "transformers_tp_w2": {"tp_size": 2}}


# ---- saving


def whole(state: State) -> dict[str, torch.Tensor]:
    return {name: full(tensor).detach().clone().contiguous() for name, tensor in state.items()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype in CARRIED:
        return tensor.full_tensor()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.to_local().view(torch.uint8))
    return torch.cat(parts, tensor.placements[0].dim).view(tensor.dtype)


def mapping_of(case: Case, state: State) -> dict[str, int] | None:
    if case.parts == 1 and not case.unsaved:
        return None
    found = {name: 1 + index % case.parts for index, name in enumerate(sorted(state))}
    return found | ({case.unsaved: case.parts} if case.unsaved else {})


def save(case: Case) -> State:
    state = case.state()
    writer = HuggingFaceStorageWriter("ckpt", fqn_to_index_mapping=mapping_of(case, state), **case.writer)
    dcp.save(dict(state), storage_writer=writer, no_dist=not case.writer)
    return state


def save_transformers(name: str) -> State:
    """`save_pretrained(distributed_checkpoint=True)` of a Llama that transformers itself sharded."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        torch.manual_seed(0)
        model = build("llama")
        randomize(model, "llama")
        model.bfloat16().save_pretrained("whole")
    dist.barrier()
    config = DistributedConfig(**TRANSFORMERS[name])
    model = LlamaForCausalLM.from_pretrained("whole", distributed_config=config)
    model.save_pretrained("ckpt", distributed_checkpoint=True)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree("whole")
    return get_model_state_dict(model)


def record(name: str, world: int, features: tuple[str, ...], tensors: int) -> dict[str, Any]:
    import transformers

    used = {"transformers": transformers.__version__} if name in TRANSFORMERS else {}
    return {
        "name": name,
        "torch": torch.__version__,
        **used,
        "world": world,
        "features": features,
        "entry": "ckpt",
        "truth_made_by": "DTensor.full_tensor",
        "tensors": tensors,
    }


def worker(name: str) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    case = next((one for one in CASES if one.name == name), None)
    state = save(case) if case else save_transformers(name)
    features = case.features if case else ("config.json beside, save_pretrained(distributed_checkpoint=True)",)
    truth = whole(state)
    if dist.get_rank() == 0:
        save_file(truth, "truth.safetensors")
        text = json.dumps(record(name, dist.get_world_size(), features, len(truth)), indent=1)
        pathlib.Path("case.json").write_text(text + "\n")
        print(f"OK {name}: {len(truth)} tensors", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker)
        return 0
    worlds = {case.name: case.world for case in CASES} | dict.fromkeys(TRANSFORMERS, 2)
    if given.list:
        print(*worlds, sep="\n")
        return 0
    script, out = os.path.abspath(__file__), given.out.resolve()
    for name in [given.only] if given.only else worlds:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
        os.chdir(out / name)
        status = spawn(script, ["--out", ".", "--worker", name], worlds[name])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
