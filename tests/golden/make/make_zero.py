"""Makes tests/golden/zero: small checkpoints trained and saved by DeepSpeed, each with its truth.

    python make_zero.py OUT [CASE ...]

Environment: torch 2.13.0 (CPU), deepspeed 0.19.8, safetensors; see README.md beside this file. Two steps of Adam on a
model of odd shapes, over gloo, one process a rank. The truth is DeepSpeed's own zero_to_fp32 where it can read what it
wrote; elsewhere the live parameters, gathered before saving.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", TOKENIZERS_PARALLELISM="false")

import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import nn

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}

# name: stage, world, precision, and what is special about it
CASES: dict[str, dict] = {
    "z0_w2_bf16": {"stage": 0, "world": 2, "precision": BF16},
    "z1_w2_bf16": {"stage": 1, "world": 2, "precision": BF16},
    "z2_w2_bf16": {"stage": 2, "world": 2, "precision": BF16},
    "z3_w2_bf16": {"stage": 3, "world": 2, "precision": BF16},
    "z1_w3_groups": {"stage": 1, "world": 3, "precision": BF16, "groups": 3},
    "z2_w3_groups": {"stage": 2, "world": 3, "precision": BF16, "groups": 3},
    "z3_w3_groups": {"stage": 3, "world": 3, "precision": BF16, "groups": 3},
    "z3_w4_mostly_padding": {"stage": 3, "world": 4, "precision": BF16},
    "z3_w2_sub_groups": {"stage": 3, "world": 2, "precision": BF16, "zero": {"sub_group_size": 100}},
    "z2_w2_fp16": {"stage": 2, "world": 2, "precision": FP16},
    "z3_w2_fp16": {"stage": 3, "world": 2, "precision": FP16},
    "z2_w2_fp32": {"stage": 2, "world": 2, "precision": {}},
    "z1_w2_tied": {"stage": 1, "world": 2, "precision": BF16, "tied": True},
    "z2_w2_tied": {"stage": 2, "world": 2, "precision": BF16, "tied": True},
    "z3_w2_tied": {"stage": 3, "world": 2, "precision": BF16, "tied": True},
    "z2_w2_exclude_frozen": {"stage": 2, "world": 2, "precision": BF16, "exclude": True},
    "z3_w2_exclude_frozen": {"stage": 3, "world": 2, "precision": BF16, "exclude": True},
    "z2_w3_round_robin": {"stage": 2, "world": 3, "precision": BF16, "zero": {"round_robin_gradients": True}},
    "z2_w3_param_alignment": {"stage": 2, "world": 3, "precision": BF16, "zero": {"parameter_alignment": True}},
    "z1_w2_bf16_optimizer": {
        "stage": 1, "world": 2, "precision": BF16, "extra": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "z2_w2_elastic": {"stage": 2, "world": 2, "precision": BF16, "zero": {"elastic_checkpoint": True}},
    "z2_w2_client_state": {"stage": 2, "world": 2, "precision": BF16, "client": True},
    "z2_w2_two_tags": {"stage": 2, "world": 2, "precision": BF16, "tags": 2},
}


class Model(nn.Module):
    """Odd sizes, frozen parts, buffers of every kind; optionally a tied head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.frozen = nn.Linear(6, 5)
        self.odd = nn.Parameter(torch.randn(7))
        self.one = nn.Parameter(torch.randn(1))
        self.two = nn.Parameter(torch.randn(2))
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 13, bias=False)
        self.register_buffer("running", torch.linspace(0, 1, 3))
        self.register_buffer("steps", torch.tensor(41, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("temporary", torch.ones(2), persistent=False)
        self.frozen.requires_grad_(False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.embed(ids))
        x = x + self.frozen(x).sum() + self.odd.sum() * self.one + self.two.sum()
        return self.head(x).float().pow(2).mean()


class OfTheUser:
    """A class that no reader can import."""


def groups_of(model: Model, count: int) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if count == 1:
        return [{"params": [p for _, p in named]}]
    small = [p for name, p in named if name in ("one", "two")]  # a group that leaves a rank with nothing
    biases = [p for name, p in named if name.endswith("bias") or name == "odd"]
    chosen = {id(p) for p in small + biases}
    return [{"params": [p for _, p in named if id(p) not in chosen]}, {"params": biases}, {"params": small}]


def client_state() -> dict:
    import argparse
    import collections
    import datetime
    import pathlib

    import numpy as np

    return {
        "args": argparse.Namespace(lr=1e-3, name="x"),
        "when": datetime.datetime(2026, 1, 2),
        "array": np.arange(3.0),
        "number": np.float32(2),
        "counts": collections.defaultdict(list, a=[1]),
        "path": pathlib.PurePosixPath("a/b"),
        "mine": OfTheUser(),
        "kinds": {1, 2},
        "type": torch.bfloat16,
    }


def train(rank: int, name: str, case: dict, folder: str, port: int) -> None:
    world = case["world"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # a JIT build that is not needed
    accelerator = type(deepspeed.accelerator.get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    model = Model(case.get("tied", False))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        **case["precision"],
        **case.get("extra", {}),
    }
    groups = groups_of(model, case.get("groups", 1))
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.Adam(groups, lr=0.01), config=config)
    for tag in range(case.get("tags", 1)):
        for _ in range(2):
            engine.backward(engine(torch.arange(4) % 13 + rank))
            engine.step()
        extra = {"exclude_frozen_parameters": True} if case.get("exclude") else {}
        engine.save_checkpoint(folder, client_state=client_state() if case.get("client") else {}, **extra)
    live(engine, rank, Path(folder).parent / "live.safetensors")
    torch.distributed.barrier()


def live(engine, rank: int, path: Path) -> None:
    """The model's tensors as they stand in memory, in the training type."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            found[name] = parameter.detach().clone()
    persistent = set(engine.module.state_dict().keys())
    found |= {name: b.detach().clone() for name, b in engine.module.named_buffers() if name in persistent}
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)


def truth(name: str, case: dict, folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """DeepSpeed's reading, completed by the live tensors where DeepSpeed leaves some out or refuses."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import load_file

    stored = load_file(folder / "live.safetensors")
    if case.get("exclude"):
        stored = {key: value for key, value in stored.items() if not key.startswith("frozen.")}
    try:
        read = get_fp32_state_dict_from_zero_checkpoint(str(folder / "ckpt"))
    except Exception as error:
        return reference(case, folder, stored), f"reference, since zero_to_fp32 refuses: {type(error).__name__}"
    read = {key: value.clone() for key, value in read.items()}
    missing = sorted(set(stored) - set(read))
    read |= {key: stored[key] for key in missing}
    for key, value in read.items():  # the masters, rounded, are the live weights
        assert torch.equal(value.to(stored[key].dtype), stored[key]), (name, key)
    return read, "zero_to_fp32" + (f"; {', '.join(missing)} from memory" if missing else "")


def reference(case: dict, folder: Path, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masters that zero_to_fp32 does not read: unnamed lists at stage 0, flat groups of BF16_Optimizer at stage 1."""
    tag = folder / "ckpt" / (folder / "ckpt" / "latest").read_text()
    state = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=False)
    if case["stage"] == 0:
        names = [name for name, _ in Model(case.get("tied", False)).named_parameters() if not name.startswith("frozen")]
        masters = dict(zip(names, state["optimizer"]["fp32_groups"][0], strict=True))
    else:
        ranks = [torch.load(path, weights_only=False) for path in sorted(tag.glob("*optim_states.pt"))]
        flats = [rank["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] for rank in ranks]
        flat, masters = torch.cat(flats), {}
        for name, shape in state["param_shapes"][0].items():
            masters[name], flat = flat[: shape.numel()].view(shape), flat[shape.numel() :]
    for name, value in masters.items():
        assert torch.equal(value.to(stored[name].dtype), stored[name]), name
    return {**stored, **{name: value.detach().clone() for name, value in masters.items()}}


def make(name: str, case: dict, out: Path) -> None:
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "ckpt").mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train, (name, case, str(folder / "ckpt"), port), nprocs=case["world"])
    import deepspeed

    tensors, made_by = truth(name, case, folder)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "truth.safetensors")
    (folder / "live.safetensors").unlink()
    for script in (folder / "ckpt").glob("*.py"):
        script.unlink()
    facts = {
        "name": name, "stage": case["stage"], "world": case["world"], "deepspeed": deepspeed.__version__,
        "torch": torch.__version__, "truth_made_by": made_by,
        "special": {k: v for k, v in case.items() if k not in ("stage", "world")},
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    for wanted in sys.argv[2:] or CASES:
        make(wanted, CASES[wanted], Path(sys.argv[1]))
        print("made", wanted, flush=True)
