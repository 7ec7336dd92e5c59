"""Makes the golden checkpoint of a real `transformers.Trainer` run with DeepSpeed ZeRO-2.

    python make_hf_trainer.py --out DIR

DIR/checkpoint-2 is laid out as Trainer writes it: config.json beside global_step2 and latest.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from processes import prepare_deepspeed, spawn

KEPT = ("config.json", "generation_config.json", "trainer_state.json", "latest")


def worker() -> None:
    version = prepare_deepspeed()
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import Trainer, TrainingArguments

    from tiny_models import LENGTH, VOCAB, build

    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    model = build("llama")
    generator = torch.Generator().manual_seed(6)
    rows = torch.randint(0, VOCAB, (8, LENGTH), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    zero = {
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "bf16": {"enabled": True},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    arguments = TrainingArguments(
        output_dir="run", max_steps=2, save_steps=2, per_device_train_batch_size=2, bf16=True, use_cpu=True,
        deepspeed=zero, learning_rate=1e-2, report_to=[], seed=7, logging_steps=1, ddp_backend="gloo",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    live = {n: p.detach().clone() for n, p in trainer.model_wrapped.module.named_parameters()}
    torch.distributed.barrier()
    if os.environ["RANK"] != "0":
        return
    point = pathlib.Path("run/checkpoint-2")
    for child in point.iterdir():
        if child.is_file() and child.name not in KEPT:
            child.unlink()
    shutil.rmtree("checkpoint-2", ignore_errors=True)
    shutil.copytree(point, "checkpoint-2")
    shutil.rmtree("run")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    truth = dict(get_fp32_state_dict_from_zero_checkpoint("checkpoint-2"))
    if set(truth) != set(live):
        raise AssertionError("the truth has other tensors than the model")
    for name, value in truth.items():
        if not torch.equal(value.to(live[name].dtype), live[name]):
            raise AssertionError(f"{name} differs from the parameter in memory")
    save_file({n: t.detach().clone().contiguous() for n, t in sorted(truth.items())}, "truth.safetensors")
    record = {
        "name": "hf_trainer",
        "deepspeed": version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stage": 2,
        "world": 2,
        "dtype": "bf16",
        "features": ["transformers.Trainer layout"],
        "entry": "checkpoint-2",
        "truth_made_by": "DeepSpeed zero_to_fp32",
        "checks": {"tensors": len(truth), "equal_after_rounding_to_the_weights_in_memory": len(truth)},
        "notes": "removed: rng states, training_args.bin, scheduler, zero_to_fp32.py",
    }
    pathlib.Path("case.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"OK hf_trainer: {len(truth)} tensors", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker()
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    script = os.path.abspath(__file__)
    os.chdir(given.out)
    return spawn(script, ["--out", ".", "--worker"], 2)


if __name__ == "__main__":
    sys.exit(main())
