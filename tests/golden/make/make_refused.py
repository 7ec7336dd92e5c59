"""Makes the golden checkpoints of the kinds that shardmerge must name and refuse.

    python make_refused.py --out DIR [--only NAME ...]

Mixture of experts and tensor parallel parts, each by the DeepSpeed that is installed. They have no truth.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shutil
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from processes import prepare_deepspeed, spawn

NAMES = ("moe_z2", "tensor_parallel")
WHAT = {
    "moe_z2": ("mixture of experts, 4 experts over 2 ranks, ZeRO-2", 2),
    "tensor_parallel": ("AutoTP over 2 ranks, ZeRO-1", 1),
}


def base_config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1000,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "bf16": {"enabled": True},
        **more,
    }


def save(engine: Any, name: str) -> None:
    engine.save_checkpoint(f"{name}/ckpt", client_state={"note": "tiny"})


def moe(name: str, rank: int) -> None:
    import deepspeed
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(6, 8)
            self.moe = MoE(8, nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 8)), num_experts=4, ep_size=2, k=1)
            self.out = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden, balance, _ = self.moe(self.inp(x))
            return self.out(hidden).float().pow(2).mean() + balance.float()

    model = Model()
    group = {"params": list(model.parameters()), "name": "all"}
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(group), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=base_config(2))
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        engine.backward(engine(torch.randn(2, 4, 6, generator=generator).bfloat16()))
        engine.step()
    save(engine, name)


def tensor_parallel(name: str, rank: int) -> None:
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False, attn_implementation="eager",
    )).bfloat16()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = base_config(1, tensor_parallel={"autotp_size": 2})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(2):
        ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    save(engine, name)


def worker(name: str) -> None:
    version = prepare_deepspeed()
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    rank = int(os.environ["RANK"])
    {"moe_z2": moe, "tensor_parallel": tensor_parallel}[name](name, rank)
    torch.distributed.barrier()
    if rank:
        return
    here = pathlib.Path(name)
    for script in ("zero_to_fp32.py", "zero_to_torch.py"):
        (here / "ckpt" / script).unlink(missing_ok=True)
    refusal = ""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        get_fp32_state_dict_from_zero_checkpoint(str(here / "ckpt"))
    except Exception as error:
        refusal = f"{type(error).__name__}: {str(error)[:160]}"
    record = {
        "name": name,
        "deepspeed": version,
        "torch": torch.__version__,
        "stage": WHAT[name][1],
        "world": 2,
        "dtype": "bf16",
        "features": [WHAT[name][0]],
        "entry": "ckpt",
        "truth_made_by": None,
        "deepspeed_zero_to_fp32": refusal or "does not refuse it",
        "notes": "must be refused by name",
    }
    (here / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    size = sum(p.stat().st_size for p in here.rglob("*") if p.is_file())
    print(f"OK {name}: {size} bytes; DeepSpeed: {record['deepspeed_zero_to_fp32']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*", choices=NAMES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    script = os.path.abspath(__file__)
    os.chdir(given.out)
    status = 0
    for name in given.only or NAMES:
        shutil.rmtree(name, ignore_errors=True)
        if spawn(script, ["--out", ".", "--worker", name], 2):
            print(f"FAILED {name}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
