"""Measures what planning the largest models costs: headers and names are true, the data are holes.

    python -m benchmarks.scale [--cases names,experts,zero3,dcp-70b ...] [--scratch DIRECTORY] [--runs 3] [--note TEXT]

Needs a few GB of disk for a while, nearly all of it headers. Results go to ``benchmarks/results/planning.json``, beside
those of cases measured before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import synthetic
from benchmarks.distributed import write_dcp
from benchmarks.harness import answer, measure, succeed
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.synthetic import LlamaShape, Shapes

RESULT = ROOT / "benchmarks" / "results" / "planning.json"

LLAMA_3_70B = LlamaShape(8192, 80, 64, 8, 28672, 128256)
LLAMA_3_405B = LlamaShape(16384, 126, 128, 8, 53248, 128256)
# Ranks of a node: where a rank's tensors were, as torch saves it, is all that tells most rank files apart.
GPUS = 8


@dataclass(frozen=True)
class DeepSeekShape:
    """The sizes of DeepSeek-V3 that decide its tensors: 671 B parameters in fp8, and a layer that predicts ahead."""

    hidden: int = 7168
    layers: int = 61
    dense: int = 3
    experts: int = 256
    intermediate: int = 18432
    expert: int = 2048
    heads: int = 128
    vocab: int = 129280

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yields every tensor of the published checkpoint: name, shape, dtype."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden), "BF16"
        for layer in range(self.layers):
            yield from self._layer(f"model.layers.{layer}", moe=layer >= self.dense)
        yield from self._ahead(f"model.layers.{self.layers}")
        yield "model.norm.weight", (self.hidden,), "BF16"
        yield "lm_head.weight", (self.vocab, self.hidden), "BF16"

    def _ahead(self, at: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{at}.embed_tokens.weight", (self.vocab, self.hidden), "BF16"
        yield f"{at}.enorm.weight", (self.hidden,), "BF16"
        yield f"{at}.hnorm.weight", (self.hidden,), "BF16"
        yield f"{at}.eh_proj.weight", (self.hidden, 2 * self.hidden), "BF16"
        yield f"{at}.shared_head.norm.weight", (self.hidden,), "BF16"
        yield f"{at}.shared_head.head.weight", (self.vocab, self.hidden), "BF16"
        yield from self._layer(at, moe=True)

    def _layer(self, at: str, *, moe: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield from _fp8(f"{at}.self_attn.q_a_proj", 1536, self.hidden)
        yield f"{at}.self_attn.q_a_layernorm.weight", (1536,), "BF16"
        yield from _fp8(f"{at}.self_attn.q_b_proj", self.heads * 192, 1536)
        yield from _fp8(f"{at}.self_attn.kv_a_proj_with_mqa", 576, self.hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", (512,), "BF16"
        yield from _fp8(f"{at}.self_attn.kv_b_proj", self.heads * 256, 512)
        yield from _fp8(f"{at}.self_attn.o_proj", self.hidden, self.heads * 128)
        if moe:
            yield f"{at}.mlp.gate.weight", (self.experts, self.hidden), "BF16"
            yield f"{at}.mlp.gate.e_score_correction_bias", (self.experts,), "F32"
            yield from self._mlp(f"{at}.mlp.shared_experts", self.expert)
            for expert in range(self.experts):
                yield from self._mlp(f"{at}.mlp.experts.{expert}", self.expert)
        else:
            yield from self._mlp(f"{at}.mlp", self.intermediate)
        yield f"{at}.input_layernorm.weight", (self.hidden,), "BF16"
        yield f"{at}.post_attention_layernorm.weight", (self.hidden,), "BF16"

    def _mlp(self, at: str, inner: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield from _fp8(f"{at}.gate_proj", inner, self.hidden)
        yield from _fp8(f"{at}.up_proj", inner, self.hidden)
        yield from _fp8(f"{at}.down_proj", self.hidden, inner)


def _fp8(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    yield f"{name}.weight", (rows, columns), "F8_E4M3"
    yield f"{name}.weight_scale_inv", (-(-rows // 128), -(-columns // 128)), "F32"


_SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def write_sharded(folder: Path, tensors: Iterator[tuple[str, tuple[int, ...], str]], shard_size: int) -> int:
    """Writes safetensors shards with holes for data and their index; returns how many shards there are."""
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...], str, int]]] = [[]]
    filled = 0
    for name, shape, dtype in tensors:
        nbytes = prod(shape) * _SIZES[dtype]
        if shards[-1] and filled + nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape, dtype, nbytes))
        filled += nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        total += _write_shard(folder / file, shard)
        weight_map |= {name: file for name, *_ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    return len(shards)


def _write_shard(path: Path, tensors: Sequence[tuple[str, tuple[int, ...], str, int]]) -> int:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    cursor = 0
    for name, shape, dtype, nbytes in tensors:
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [cursor, cursor + nbytes]}
        cursor += nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + cursor)
    return cursor


def write_zero3(folder: Path, shapes: Shapes, world: int) -> Path:
    """Writes a ZeRO-3 tag directory of many ranks as GPUs save it, holes for data, and returns it."""
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    model = synthetic.model_states(shapes, 3, world, {})
    optim = synthetic.optim_states(synthetic.rank_numel(shapes, 3, world, 0), 3, world)
    for rank in range(world):
        with _on_gpu(rank % GPUS):
            synthetic.write_torch(tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model)
            synthetic.write_torch(tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", optim)
    return tag


@contextmanager
def _on_gpu(number: int) -> Iterator[None]:
    """What torch.save writes of tensors on a GPU differs in this word alone."""
    with patch.object(torch.serialization, "location_tag", lambda storage: f"cuda:{number}"):
        yield


NAMES = """\
shardmerge: 1
sources: {src: model}
output: {path: out}
tensors:
  language_model.{rest...}: src:{rest...}
"""
# DeepSeek's names to those of Mixtral-like code, expert by expert.
EXPERTS = """\
shardmerge: 1
sources: {src: model}
output: {path: out}
tensors:
  model.embed.weight: src:model.embed_tokens.weight
  model.final.weight: src:model.norm.weight
  lm_head.weight: src:lm_head.weight
  model.blocks.{i:int}.moe.experts.{e:int}.w1.{p}: src:model.layers.{i:int}.mlp.experts.{e:int}.gate_proj.{p}
  model.blocks.{i:int}.moe.experts.{e:int}.w2.{p}: src:model.layers.{i:int}.mlp.experts.{e:int}.down_proj.{p}
  model.blocks.{i:int}.moe.experts.{e:int}.w3.{p}: src:model.layers.{i:int}.mlp.experts.{e:int}.up_proj.{p}
  model.blocks.{i:int}.moe.shared.{m}.{p}: src:model.layers.{i:int}.mlp.shared_experts.{m}.{p}
  model.blocks.{i:int}.moe.gate.{p}: src:model.layers.{i:int}.mlp.gate.{p}
  model.blocks.{i:int}.mlp.{m:gate_proj|up_proj|down_proj}.{p}: src:model.layers.{i:int}.mlp.{m:gate_proj|up_proj|down_proj}.{p}
  model.blocks.{i:int}.attention.{m}.{p}: src:model.layers.{i:int}.self_attn.{m}.{p}
  model.blocks.{i:int}.{n:input|post_attention}_norm.{p}: src:model.layers.{i:int}.{n:input|post_attention}_layernorm.{p}
  model.blocks.{i:int}.ahead.{n:embed_tokens|enorm|hnorm|eh_proj}.{p}: src:model.layers.{i:int}.{n:embed_tokens|enorm|hnorm|eh_proj}.{p}
  model.blocks.{i:int}.ahead.{n}.{p}: src:model.layers.{i:int}.shared_head.{n}.{p}
"""  # noqa: E501
MASTERS = """\
shardmerge: 1
sources: {trained: model}
output: {path: out, dtype: bfloat16}
tensors:
  "{rest...}": trained:{rest...}
"""


def write_671b(folder: Path, mapping: str) -> Path:
    """Writes DeepSeek-V3 in its 163 shards and a mapping beside it, and returns the mapping."""
    write_sharded(folder / "model", DeepSeekShape().tensors(), 4_270_000_000)
    return _mapping(folder, mapping)


def write_405b(folder: Path, world: int = 1024, shape: LlamaShape = LLAMA_3_405B) -> Path:
    """Writes a ZeRO-3 Llama 405B of 1,024 ranks and a mapping beside it, and returns the mapping."""
    write_zero3(folder / "model", shape.tensors(), world)
    return _mapping(folder, MASTERS)


def write_70b_dcp(folder: Path, world: int = 256, shape: LlamaShape = LLAMA_3_70B) -> Path:
    """Writes a Llama 70B of 256 ranks with its optimizer as DCP, a mapping beside it, and returns the mapping."""
    write_dcp(folder / "model", shape.tensors(), world, moments=True, fill=False)
    return _mapping(folder, MASTERS)


def write_405b_dcp(folder: Path, world: int = 1024, shape: LlamaShape = LLAMA_3_405B) -> Path:
    """Writes a Llama 405B of 1,024 ranks as DCP, a mapping beside it, and returns the mapping."""
    write_dcp(folder / "model", shape.tensors(), world, fill=False)
    return _mapping(folder, MASTERS)


def write_8b(folder: Path) -> Path:
    """Writes a Llama 8B of ZeRO-2 on eight ranks and a mapping beside it, and returns the mapping."""
    synthetic.write_zero(folder / "model", synthetic.LLAMA_3_8B.tensors(), stage=2, world=8, fill=False)
    return _mapping(folder, MASTERS)


def _mapping(folder: Path, text: str) -> Path:
    path = folder / "mapping.yaml"
    path.write_text(text, "utf-8")
    return path


CASES: Mapping[str, tuple[str, Callable[[Path], Path]]] = {
    "names": ("DeepSeek-V3 671B, 163 shards; one rule for all names", lambda folder: write_671b(folder, NAMES)),
    "experts": ("DeepSeek-V3 671B, 163 shards; rules with captures", lambda folder: write_671b(folder, EXPERTS)),
    "zero3": ("Llama 405B, ZeRO-3 of 1,024 ranks, fp32 to bf16", write_405b),
    "dcp-70b": ("Llama 70B with AdamW, FSDP2 of 256 ranks (DCP)", write_70b_dcp),
    "dcp-405b": ("Llama 405B, FSDP2 of 1,024 ranks (DCP)", write_405b_dcp),
    "zero2-8b": ("Llama 8B, ZeRO-2 of 8 ranks, fp32 to bf16", write_8b),
}


def commands(mapping: Path) -> Mapping[str, Sequence[str | Path]]:
    """Returns what is measured: a plan of the mapping, and the same checkpoint through ``convert``."""
    program = (sys.executable, "-m", "shardmerge")
    convert = (*program, "convert", mapping.parent / "model", mapping.parent / "out", "--dry-run", "--json")
    return {"plan": (*program, "plan", mapping, "--json"), "convert": convert}


def measure_plan(command: Sequence[str | Path], runs: int) -> dict[str, object]:
    """Returns the figures of a planning process: seconds, bytes, tensors."""
    done = [succeed(measure(command, cwd=ROOT)) for _ in range(runs)]
    cost = answer(done[0])["cost"]
    assert isinstance(cost, dict)
    return {
        "wall": round(statistics.median(one.wall for one in done), 2),
        "walls": [round(one.wall, 2) for one in done],
        "cpu": round(statistics.median(one.cpu for one in done), 2),
        "peak": max(one.peak for one in done),
        "printed": len(done[0].stdout),
        "tensors": cost["tensors"],
        "total_size": cost["total_size"],
        "planned_peak": cost["planned_peak"],
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description="What planning the largest models costs.")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where a few GB of headers may lie meanwhile")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    if given.scratch:
        given.scratch.mkdir(parents=True, exist_ok=True)
    as_installed()
    for case in given.cases.split(","):
        about, write = CASES[case]
        with tempfile.TemporaryDirectory(prefix="planning-", dir=given.scratch) as name:
            folder = Path(name)
            seen = {**provenance(), "machine": machine_card(folder, None, given.note)}
            mapping = write(folder)
            files = sum(1 for path in folder.rglob("*") if path.is_file()) - 1
            figures = {what: measure_plan(command, given.runs) for what, command in commands(mapping).items()}
        results = json.loads(RESULT.read_text("utf-8"))["runs"] if RESULT.is_file() else {}
        results[case] = {"about": about, "files": files, **figures, **seen}
        RESULT.write_text(json.dumps({"schema": 1, "runs": results}, indent=1) + "\n", "utf-8")
        print(case, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
