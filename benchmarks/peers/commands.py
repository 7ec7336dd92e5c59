"""How each peer is run on the input of a case."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.contender import Contender
from benchmarks.peers import environment

_HERE = Path(__file__).parent
# DeepSpeed looks for an accelerator and warns of what it does not find; nobody here may ask a hub.
ENV = {"DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1"}


def deepspeed(source: Path) -> list[Contender]:
    """Returns the scripts of DeepSpeed; they write fp32, or bf16, or fp32 that is then cast."""
    python = environment.deepspeed()
    fp32: list[str | Path] = [python, "-m", "deepspeed.utils.zero_to_fp32"]
    name = f"DeepSpeed {environment.DEEPSPEED}"
    cast = f'mkdir "$2" && "$0" -m deepspeed.utils.zero_to_fp32 "$1" "$2/fp32" {_SAFE} && "$0" "$3" "$2/fp32" "$2"'
    return [
        Contender(
            "zero_to_torch",
            f"{name} zero_to_torch --dtype bf16",
            "peer",
            lambda out: [python, "-m", "deepspeed.utils.zero_to_torch", source, out, "--dtype", "bf16", _SAFE],
            f"zero_to_torch.py IN OUT --dtype bf16 {_SAFE}",
            same_as="ours",
        ),
        Contender(
            "zero_to_fp32",
            f"{name} zero_to_fp32, which writes fp32, twice the bytes",
            "peer",
            lambda out: [*fp32, source, out, _SAFE],
            f"zero_to_fp32.py IN OUT {_SAFE}",
        ),
        Contender(
            "zero_to_fp32-cast",
            f"{name} zero_to_fp32, then load, cast, save",
            "peer",
            lambda out: ["sh", "-c", cast, python, source, out, _HERE / "cast_save.py"],
            f"zero_to_fp32.py IN FP32 {_SAFE}; load_file; to(bfloat16); save_file",
            same_as="ours",
        ),
    ]


_SAFE = "--safe_serialization"


def load_rename_save(source: Path) -> Contender:
    """Returns what a script of ten lines does."""
    return Contender(
        "load-save",
        f"safetensors {version('safetensors')}: load_file, rename, save_file",
        "peer",
        lambda out: [sys.executable, _HERE / "rename.py", source, out],
        "load_file; rename; save_file",
        same_as="ours",
    )


def transformers(source: Path) -> Contender:
    """Returns loading and saving of a model; its names stay."""
    return Contender(
        "transformers",
        f"transformers {version('transformers')}: from_pretrained, save_pretrained (no new names)",
        "peer",
        lambda out: [sys.executable, _HERE / "transformers_save.py", source, out],
        "AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)",
        same_as="input",
    )


def mergekit(source: Path, config: Path) -> Contender:
    """Returns mergekit's passthrough of one model; its names stay. Writes its configuration."""
    python = environment.mergekit()
    config.write_text(f"merge_method: passthrough\nmodels: [{{model: {source}}}]\ndtype: bfloat16\n", "utf-8")
    flags = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    return Contender(
        "mergekit",
        f"mergekit {environment.MERGEKIT}: passthrough (no new names)",
        "peer",
        lambda out: [python, python.with_name("mergekit-yaml"), config, out, *flags],
        "mergekit-yaml passthrough.yaml OUT",
        same_as="input",
    )


def mergekit_merge(config: Path) -> Contender:
    """Returns mergekit's merge of a configuration."""
    python = environment.mergekit()
    flags = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--lazy-unpickle")
    return Contender(
        "mergekit",
        f"mergekit {environment.MERGEKIT}",
        "peer",
        lambda out: [python, python.with_name("mergekit-yaml"), config, out, *flags],
        "mergekit-yaml merge.yml OUT --lazy-unpickle",
    )


def consolidate(source: Path) -> Contender:
    """Returns torch's consolidation of shards; their header says where each tensor goes; names stay."""
    return Contender(
        "consolidate",
        f"torch {version('torch')}: DCP consolidate_safetensors_files (no new names)",
        "peer",
        lambda out: [sys.executable, _HERE / "consolidate.py", source, out],
        "consolidate_safetensors_files(IN, OUT, ...)",
        same_as="input",
    )


def accelerate(checkpoint: Path) -> Contender:
    """Returns accelerate's merge of a distributed checkpoint of the same tensors; names stay."""
    return Contender(
        "accelerate",
        f"accelerate {version('accelerate')}: merge-weights of the same tensors in .distcp files (no new names)",
        "peer",
        lambda out: [sys.executable, "-m", "accelerate.commands.accelerate_cli", "merge-weights", checkpoint, out],
        "accelerate merge-weights DCP OUT",
        same_as="input",
    )


def dcp_to_torch(checkpoint: Path) -> Contender:
    """Returns torch's own conversion to one file, which is then loaded, cast and saved."""
    return Contender(
        "dcp_to_torch",
        f"torch {version('torch')}: dcp_to_torch_save, then load, cast, save",
        "peer",
        lambda out: [sys.executable, _HERE / "dcp_cast_save.py", checkpoint, out],
        "dcp_to_torch_save(DCP, FILE); torch.load(FILE); to(bfloat16); save_file",
        same_as="ours",
    )


def verl(source: Path) -> Contender:
    """Returns verl's merger of its own files, which writes bf16."""
    python = environment.verl()
    merge: list[str | Path] = [python, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", source]
    return Contender(
        "verl",
        f"verl {environment.VERL}: model_merger",
        "peer",
        lambda out: [*merge, "--target_dir", out],
        "python -m verl.model_merger merge --backend fsdp --local_dir IN --target_dir OUT",
        same_as="ours",
    )


def peft(source: Path) -> Contender:
    """Returns peft's merge, which rounds twice more than ours."""
    return Contender(
        "peft",
        f"peft {version('peft')}: from_pretrained, merge_and_unload, save_pretrained",
        "peer",
        lambda out: [sys.executable, _HERE / "peft_merge.py", source / "base", source / "adapter", out],
        "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)",
    )
