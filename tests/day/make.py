"""Makes the checkpoints of the day, and writes down the jobs: ``python -m tests.day.make DIRECTORY [--tiny]``.

The small ones are golden checkpoints, made by the real tools. Those of 8B widths are holes with islands of real values:
in them every result is zeros but for what says that each part went to its place.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.distributed import write_dcp
from benchmarks.merges import LINEAR, model_config, write_adapter, write_model
from benchmarks.synthetic import (
    LLAMA_3_8B,
    LlamaShape,
    _last_storage,
    clip_model_tensors,
    rank_numel,
    write_safetensors,
    write_zero,
)
from tests.adapter_runs import llama, saved, trained
from tests.conftest import GOLDEN
from tests.day.jobs import Job, write_jobs
from tests.test_plan_at_size import CLIP_CONFIG, LLAMA_3_8B_CONFIG, TRAINING_CONFIG

MEDIUM = LlamaShape(1024, 2, 16, 8, 3072, 32_000)
_ISLAND, _APART = 1 << 16, 64 << 20

_TWO = """\
shardmerge: 1
sources: {{a: {a}, b: {b}}}
tensors:
  "{{rest...}}": {{op: linear, of: ["a:{{rest...}}", "b:{{rest...}}"]}}
"""
_ONE = """\
shardmerge: 1
sources: {{model: {source}}}
output: {{path: out, dtype: {dtype}, shard_size: {size}}}
tensors: {{"{{rest...}}": "model:{{rest...}}"}}
"""
_LORA = """\
shardmerge: 1
sources: {{base: {base}, adapter: {adapter}}}
adapters: [{{from: adapter, onto: base}}]
tensors: {{"{{rest...}}": "base:{{rest...}}"}}
"""
_LLAVA = """\
shardmerge: 1
sources: {{trained: {trained}, llm: {llm}, vision: {vision}}}
use: xtuner/llava-to-{to}
output: {{path: out, dtype: bfloat16, shard_size: {size}}}
"""


def islands(path: Path, start: int, end: int, itemsize: int, seed: int) -> None:
    """Writes normal values here and there between two places of a sparse file, and at both ends."""
    rng = np.random.default_rng(seed)
    with path.open("r+b") as file:
        for at in [*range(start, end, _APART), max(start, (end - _ISLAND) // itemsize * itemsize)]:
            values = (rng.standard_normal(min(_ISLAND, end - at) // itemsize) * 0.02).astype(np.float32)
            file.seek(at)
            file.write(values.tobytes() if itemsize == 4 else values.view(np.uint16)[1::2].tobytes())


def sparse_model(folder: Path, shape: LlamaShape, dtype: str = "BF16", seed: int = 0) -> Path:
    """Writes a LlamaForCausalLM directory with islands."""
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    write_safetensors(path, shape.tensors(), dtype)
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    islands(path, 8 + header, path.stat().st_size, 4 if dtype == "F32" else 2, seed)
    (folder / "config.json").write_text(model_config(shape))
    return folder


def sparse_zero3(folder: Path, shape: LlamaShape, world: int) -> Path:
    """Writes what ZeRO-3 saves, with islands in the master weights: the last storage of each rank's file."""
    tensors = shape.tensors()
    tag = write_zero(folder, tensors, stage=3, world=world, fill=False)
    for rank in range(world):
        path = tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        nbytes = 4 * rank_numel(tensors, 3, world, rank)
        start = _last_storage(path, nbytes)
        islands(path, start, start + nbytes, 4, rank)
    return folder


def llava(folder: Path, shape: LlamaShape, size: str) -> Path:
    """Writes a LLaVA of XTuner: the language model and projector were trained with ZeRO-2, CLIP was frozen."""
    shapes = shape.tensors("llm.")
    for layer, columns in ((0, 1024), (2, shape.hidden)):
        shapes[f"projector.model.{layer}.weight"] = (shape.hidden, columns)
        shapes[f"projector.model.{layer}.bias"] = (shape.hidden,)
    meta = {"cfg": TRAINING_CONFIG, "seed": 1, "epoch": 0, "iter": 5198, "experiment_name": "llava"}
    write_zero(folder / "trained", shapes, stage=2, world=8, fill=False, extra={"meta": meta})
    sparse_model(folder / "llm", shape)
    (folder / "llm" / "config.json").write_text(json.dumps(LLAMA_3_8B_CONFIG | {"num_hidden_layers": shape.layers}))
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(json.dumps(CLIP_CONFIG))
    state = {name: torch.randn(dims) for name, dims in clip_model_tensors()}
    torch.save(state, folder / "vision" / "pytorch_model.bin")
    return written(folder, _LLAVA, trained="trained", llm="llm", vision="vision", to="hf", size=size)


def written(folder: Path, text: str, **given: object) -> Path:
    path = folder / "mapping.yaml"
    path.write_text(text.format(**given))
    return path


def small(root: Path) -> Iterator[Job]:
    """Yields jobs of golden checkpoints."""
    for name in ("xtuner/base_llm", "xtuner/base_clip", "xtuner/single_frozen", "zero", "dcp", "mergekit/models"):
        wanted = {"zero": "llama_z3_w2_bf16", "dcp": "fsdp2_w2_bf16"}.get(name, "")
        shutil.copytree(GOLDEN / name / wanted, root / name / wanted)
    xtuner = root / "xtuner"
    bases = {"llm": str(xtuner / "base_llm"), "vision": str(xtuner / "base_clip")}
    trained_at = str(xtuner / "single_frozen" / "iter_2.pth")
    yield Job("llava", "small", trained_at, use="xtuner/llava-to-hf", bases=bases, dtype="bfloat16", other="20KB")
    tree = written(
        xtuner, _LLAVA, trained="single_frozen/iter_2.pth", llm="base_llm", vision="base_clip", to="xtuner", size="12KB"
    )
    yield Job("llava-tree", "small", str(tree), other="9KB")
    zero, dcp = str(root / "zero" / "llama_z3_w2_bf16" / "ckpt"), str(root / "dcp" / "fsdp2_w2_bf16" / "ckpt")
    yield Job("zero3", "small", zero, dtype="bfloat16", other="1KB")
    yield Job("zero3-fp32", "small", zero, shard_size="2KB", other="3KB")
    yield Job("dcp", "small", dcp, other="1KB")
    yield Job("reshard", "small", bases["llm"], shard_size="8KB", other="5KB")
    yield Job("to-dcp", "small", bases["llm"], form="dcp")
    yield Job("to-bin", "small", bases["llm"], form="bin", shard_size="8KB")
    models = root / "mergekit" / "models"
    yield Job("linear", "small", str(written(models, _TWO, a="base", b="chat")), shard_size="4KB", other="6KB")
    folder = root / "lora"
    saved(llama(), folder / "base")
    trained(llama(), folder / "adapter")
    yield Job(
        "lora", "small", str(written(folder, _LORA, base="base", adapter="adapter")), shard_size="3KB", other="4KB"
    )


def medium(root: Path, shape: LlamaShape) -> Iterator[Job]:
    """Yields jobs of models with every value real."""
    root.mkdir()
    for seed, name in enumerate(("base", "other")):
        write_model(root / name, shape, fill=True, seed=seed)
    write_zero(root / "zero3", shape.tensors(), stage=3, world=4, fill=True)
    yield Job("zero3-mid", "medium", str(root / "zero3"), dtype="bfloat16", shard_size="60MB", other="80MB")
    cast = written(root, _ONE, source="base", dtype="float16", size="60MB")
    yield Job("cast-mid", "medium", str(cast), other="90MB")
    yield Job("reshard-mid", "medium", str(root / "base"), shard_size="50MB", other="70MB")
    (root / "two").mkdir()
    two = written(root / "two", _TWO, a="../base", b="../other")
    yield Job("linear-mid", "medium", str(two), shard_size="60MB", other="80MB")
    dcp = write_dcp(root / "dcp", shape.tensors(), 4, fill=True)
    yield Job("dcp-mid", "medium", str(dcp), shard_size="70MB", other="90MB")
    (root / "lora").mkdir()
    write_adapter(root / "lora" / "adapter", shape.tensors(), 16, fill=True, modules=LINEAR)
    lora = written(root / "lora", _LORA, base="../base", adapter="adapter")
    yield Job("lora-mid", "medium", str(lora), shard_size="60MB", other="80MB")


def large(root: Path) -> Iterator[Job]:
    """Yields jobs of 8B widths: whole ones, and ones of a few layers."""
    root.mkdir()
    few, some = (replace(LLAMA_3_8B, layers=layers) for layers in (1, 8))
    yield Job("8b-reshard", "8B", str(sparse_model(root / "whole", LLAMA_3_8B)), shard_size="4GB", other="3GB")
    yield Job("8b-cast", "8B", str(sparse_model(root / "fp32", some, "F32")), dtype="bfloat16", heavy=True)
    yield Job("8b-zero3", "8B", str(sparse_zero3(root / "zero3", few, 8)), dtype="bfloat16", shard_size="1GB")
    yield Job("8b-llava", "8B", str(llava(root / "llava", few, "1GB")))
    for seed, name in enumerate("ab"):
        sparse_model(root / "two" / name, few, seed=seed)
    yield Job("8b-linear", "8B", str(written(root / "two", _TWO, a="a", b="b")), shard_size="1GB")
    write_adapter(root / "lora" / "adapter", few.tensors(), 64, fill=True, modules=LINEAR)
    lora = written(root / "lora", _LORA, base="../two/a", adapter="adapter")
    yield Job("8b-lora", "8B", str(lora), shard_size="1GB")
    dcp = write_dcp(root / "dcp", few.tensors(), 4, fill=False)
    yield Job("8b-dcp", "8B", str(dcp), shard_size="1GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="golden checkpoints only")
    given = parser.parse_args()
    torch.manual_seed(0)
    root = given.folder
    jobs = list(small(root / "small"))
    if not given.small:
        jobs += [*medium(root / "medium", MEDIUM), *large(root / "large")]
    write_jobs(jobs, root.parent / "jobs.json")


if __name__ == "__main__":
    main()
