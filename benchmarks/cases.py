"""The jobs that are measured. A key is a family and a size: ``zero2-4g`` is ZeRO-2 with 4 GiB of fp32 weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from benchmarks.contender import Contender, ours, program
from benchmarks.distributed import write_dcp, write_rank_pickles
from benchmarks.merges import METHODS, model_config, write_lora, write_merge
from benchmarks.peers import commands
from benchmarks.synthetic import LlamaShape, Shapes, llama_of, write_safetensors, write_zero

DEFAULT = (
    "zero2-1g",
    "zero2-2g",
    "zero2-4g",
    "zero3-1g",
    "zero3-4g",
    "fsdp2-1g",
    "ranks-1g",
    "rename-1g",
    "hf-reshard-1g",
    "lora-0.5b",
)
_UNITS = {"m": 1 << 20, "g": 1 << 30, "b": 4_000_000_000}
_SHARDS = 4

_RENAME = """\
shardmerge: 1
sources: {src: model}
tensors:
  transformer.{rest...}: "src:model.{rest...}"
  lm_head.weight: "src:lm_head.weight"
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A job and everyone who does it.

    Attributes
    ----------
    key, title, about
        For machines, for a heading, and for a reader.
    prepare
        Writes the input below a directory that is not there yet.
    sources
        The checkpoints in it, which hold what must be read.
    casts
        Whether the output is of another size than the input; see ``floor.floors``.
    ours
        shardmerge, on that directory.
    peers
        What people use today, by name, each on that directory.
    """

    key: str
    title: str
    about: str
    prepare: Callable[[Path], object]
    sources: tuple[str, ...]
    casts: bool
    ours: Callable[[Path], list[Contender]]
    peers: dict[str, Callable[[Path], list[Contender]]]


def case(key: str) -> Case:
    """Returns a case by its key.

    Raises
    ------
    ValueError
        There is no such family, or no size.
    """
    family, _, size = key.rpartition("-")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mgb])", size)
    if family not in _FAMILIES or not found:
        families = ", ".join(f"{name}-SIZE" for name in _FAMILIES)
        raise ValueError(f"no such case: {key}; there are {families}, with sizes as 512m, 4g or 0.5b parameters")
    return _FAMILIES[family](key, int(float(found[1]) * _UNITS[found[2]]))


def resized(key: str, size: str) -> str:
    """Returns the key of the same family with another size: ``2GiB`` makes ``zero2-4g`` into ``zero2-2g``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])(?:iB)?", size)
    if not found:
        raise ValueError(f"not a size: {size}; 512MiB or 2GiB")
    family = key if key in _FAMILIES else key.rpartition("-")[0]
    return f"{family}-{found[1]}{found[2].lower()}"


def _shape(fp32_bytes: int) -> LlamaShape:
    """Returns a LLaMA of about so many bytes; below half a GiB a narrow one, of no true shape, for tests."""
    if fp32_bytes >= 1 << 29:
        return llama_of(fp32_bytes)
    return LlamaShape(256, max(fp32_bytes // (4 * 754_176), 1), 4, 2, 768, 1024)


def _shown(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):g} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):g} MiB"


# ---- ZeRO


def _zero(stage: int, world: int) -> Callable[[str, int], Case]:
    def make(key: str, nbytes: int) -> Case:
        return Case(
            key,
            f"DeepSpeed ZeRO-{stage}, {world} ranks, {_shown(nbytes)} of fp32 weights, to bf16",
            "A LLaMA with random weights; the Adam moments are holes, which nobody here reads. Input: fp32 partitions. "
            "Output: one safetensors file of bf16.",
            lambda folder: write_zero(folder, _shape(nbytes).tensors(), stage=stage, world=world, fill=True),
            (".",),
            True,
            lambda source: ours(
                lambda out: [*program(), "convert", source, out, "--dtype", "bfloat16"],
                "shardmerge convert IN OUT --dtype bfloat16",
            ),
            {"DeepSpeed": commands.deepspeed},
        )

    return make


# ---- FSDP2


def _fsdp2(key: str, nbytes: int) -> Case:
    def prepare(folder: Path) -> None:
        write_dcp(folder / "dcp", _shape(nbytes).tensors(), 8, dtype=torch.float32, fill=True)

    return Case(
        key,
        f"FSDP2 of 8 ranks (DCP), {_shown(nbytes)} of fp32 weights, to bf16",
        "A LLaMA with random weights, cut into rows. accelerate writes fp32, twice the bytes.",
        prepare,
        ("dcp",),
        True,
        lambda source: ours(
            lambda out: [*program(), "convert", source / "dcp", out, "--dtype", "bfloat16"],
            "shardmerge convert IN OUT --dtype bfloat16",
        ),
        {
            "torch": lambda source: [commands.dcp_to_torch(source / "dcp")],
            "accelerate": lambda source: [commands.accelerate(source / "dcp")],
        },
    )


def _ranks(key: str, nbytes: int) -> Case:
    shape = _shape(nbytes)
    return Case(
        key,
        f"verl, a pickle of each of 8 ranks, {_shown(nbytes)} of fp32 weights, to bf16",
        "A LLaMA with random weights, cut into rows.",
        lambda folder: write_rank_pickles(folder / "actor", shape.tensors(), 8, model_config(shape)),
        ("actor",),
        True,
        lambda source: ours(
            lambda out: [*program(), "convert", source / "actor", out, "--dtype", "bfloat16"],
            "shardmerge convert IN OUT --dtype bfloat16",
        ),
        {"verl": lambda source: [commands.verl(source / "actor")]},
    )


# ---- the same values under other names


def _rename(key: str, nbytes: int) -> Case:
    def prepare(folder: Path) -> None:
        (folder / "model").mkdir(parents=True)
        write_safetensors(folder / "model" / "model.safetensors", _shape(2 * nbytes).tensors(), fill=True)
        (folder / "mapping.yaml").write_text(_RENAME, "utf-8")

    return Case(
        key,
        f"Rename the tensors of a safetensors file of {_shown(nbytes)}",
        "A LLaMA in bf16, `model.*` to `transformer.*`, values untouched. The floor is a copy.",
        prepare,
        ("model",),
        False,
        _run_mapping,
        {"safetensors": lambda source: [commands.load_rename_save(source / "model")]},
    )


def _reshard(key: str, nbytes: int) -> Case:
    def prepare(folder: Path) -> None:
        write_shards(folder / "model", _shape(2 * nbytes))
        (folder / "mapping.yaml").write_text(_RENAME, "utf-8")

    def accelerate(source: Path) -> list[Contender]:
        script = Path(commands.__file__).with_name("write_dcp.py")
        subprocess.run([sys.executable, script, source / "model", source / "dcp"], check=True, capture_output=True)
        return [commands.accelerate(source / "dcp")]

    return Case(
        key,
        f"{_SHARDS} shards of a Hugging Face model into one file, {_shown(nbytes)} of bf16",
        "A LLaMA in bf16. shardmerge and the script with safetensors rename `model.*` to `transformer.*`; the others "
        "cannot, and write the names they read. The shards carry what torch's consolidation asks for; accelerate reads "
        "the same tensors from .distcp files that one process wrote. The floor is a copy.",
        prepare,
        ("model",),
        False,
        _run_mapping,
        {
            "safetensors": lambda source: [commands.load_rename_save(source / "model")],
            "transformers": lambda source: [commands.transformers(source / "model")],
            "mergekit": lambda source: [commands.mergekit(source / "model", source / "passthrough.yaml")],
            "torch": lambda source: [commands.consolidate(source / "model")],
            "accelerate": accelerate,
        },
    )


def write_shards(folder: Path, shape: LlamaShape) -> None:
    """Writes a LlamaForCausalLM in bf16 as shards that are a distributed checkpoint too: each tensor whole, in one."""
    folder.mkdir(parents=True)
    tensors = shape.tensors()
    weight_map: dict[str, str] = {}
    names, share = iter(tensors), -(-len(tensors) // _SHARDS)
    for number in range(1, _SHARDS + 1):
        part: Shapes = {name: tensors[name] for name in islice(names, share)}
        file = f"model-{number:05}-of-{_SHARDS:05}.safetensors"
        write_safetensors(folder / file, part, fill=True, sharding=True, seed=number)
        weight_map |= dict.fromkeys(part, file)
    (folder / "config.json").write_text(model_config(shape), "utf-8")
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    (folder / "model.safetensors.index.json").write_text(index, "utf-8")


# ---- LoRA


def _lora(key: str, nbytes: int) -> Case:
    return Case(
        key,
        f"Merge a LoRA with r = 64 on all linear layers into a bf16 model of {nbytes / 4e9:.1g} B parameters",
        "A LLaMA and an fp32 adapter, both with random weights. peft rounds twice more than shardmerge, so the weights "
        "are not the same to the bit; `tests/test_adapters.py` holds the difference to that.",
        lambda folder: write_lora(folder, _shape(nbytes), 64, fill=True),
        ("base", "adapter"),
        True,
        _run_mapping,
        {"peft": lambda source: [commands.peft(source)]},
    )


# ---- merges


def _merge(method: str) -> Callable[[str, int], Case]:
    def family(key: str, nbytes: int) -> Case:
        models = 2 if method == "slerp" else 3
        return Case(
            key,
            f"Merge {models} bf16 models of {nbytes / 4e9:.1g} B parameters with {method}",
            "LLaMAs with random weights; the mapping is what `shardmerge init` makes of mergekit's configuration. "
            "mergekit computes in bf16 here, as people run it, and shardmerge in float32, so the weights are not the "
            "same to the bit; `tests/test_mergekit_configs.py` compares them in float32.",
            lambda folder: write_merge(folder, _shape(nbytes), method),
            {"linear": ("a", "b", "c"), "slerp": ("a", "b")}.get(method, ("base", "a", "b", "c")),
            True,
            _run_mapping,
            {"mergekit": lambda source: [commands.mergekit_merge(source / "merge.yml")]},
        )

    return family


def _run_mapping(source: Path) -> list[Contender]:
    return ours(
        lambda out: [*program(), "run", source / "mapping.yaml", "--out", out], "shardmerge run mapping.yaml --out OUT"
    )


_FAMILIES: dict[str, Callable[[str, int], Case]] = {
    "zero2": _zero(2, 2),
    "zero3": _zero(3, 8),
    "fsdp2": _fsdp2,
    "ranks": _ranks,
    "rename": _rename,
    "hf-reshard": _reshard,
    "lora": _lora,
    **{f"merge-{method.replace('_', '-')}": _merge(method) for method in METHODS},
}
