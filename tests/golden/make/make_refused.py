"""Makes the golden checkpoints of the kinds that shardmerge must name and refuse.

    python make_refused.py --out DIR [--only NAME ...]

Pipeline stages and a universal checkpoint, each by the DeepSpeed that is installed. They have no truth.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from processes import prepare_deepspeed, spawn

NAMES = ("pipeline", "universal")
WHAT = {
    "pipeline": ("two pipeline stages, ZeRO-1", 1),
    "universal": ("ds_to_universal of a ZeRO-2 checkpoint", 2),
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


def pipeline(name: str, rank: int) -> None:
    import deepspeed
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    layers = [LayerSpec(nn.Linear, 6, 8), LayerSpec(nn.Linear, 8, 8), LayerSpec(nn.LayerNorm, 8), LayerSpec(nn.Linear, 8, 3)]
    model = PipelineModule(layers=layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=base_config(1))
    generator = torch.Generator().manual_seed(5)
    batches = [(torch.randn(2, 6, generator=generator).bfloat16(), torch.randn(2, 3, generator=generator).bfloat16())
               for _ in range(2)]  # fmt: skip
    data = iter(batches)
    for _ in range(2):
        engine.train_batch(data)
    save(engine, name)


def universal(name: str, rank: int) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch import nn

    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=base_config(2))
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        engine.backward(engine(torch.randn(2, 6, generator=generator).bfloat16()).float().pow(2).mean())
        engine.step()
    save(engine, name)
    dist.barrier()
    if rank == 0:
        here = f"{name}/ckpt"
        subprocess.run(
            [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", f"{here}/global_step2",
             "--output_folder", f"{here}/global_step2_universal", "--inject_missing_state",
             "--num_extract_workers", "1", "--num_merge_workers", "1"], check=True,
        )  # fmt: skip
        shutil.rmtree(f"{here}/global_step2")
        pathlib.Path(here, "latest").unlink()
    dist.barrier()


def worker(name: str) -> None:
    version = prepare_deepspeed()
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    rank = int(os.environ["RANK"])
    {"pipeline": pipeline, "universal": universal}[name](name, rank)
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
