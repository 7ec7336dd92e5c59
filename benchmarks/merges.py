"""Merges of true width at any depth: a LoRA into its base, and three models into one. Holes stand for the values.

python -m benchmarks.merges lora|linear|ties|dare|della DIRECTORY [--layers 32]     writes the inputs and a mapping.yaml
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.synthetic import LLAMA_3_8B, LlamaShape, Shapes, write_safetensors
from shardmerge.api import init

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_LORA = """\
shardmerge: 1
sources: {base: base, adapter: adapter}
adapters: [{from: adapter, onto: base}]
tensors:
  "{rest...}": base:{rest...}
"""

_THREE = """\
shardmerge: 1
sources: {{{sources}a: a, b: b, c: c}}
tensors:
  "{{rest...}}":
    {{op: {op}, {base}of: ["a:{{rest...}}", "b:{{rest...}}", "c:{{rest...}}"]{numbers}}}
"""
# What a merge of three models says beside them; all but linear have a base.
_NUMBERS = {
    "linear": "",
    "ties": ", density: 0.2",
    "dare": ", density: 0.5, seed: 7",
    "della": ", density: 0.5, epsilon: 0.2, seed: 7",
}


def write_lora(
    folder: Path, shape: LlamaShape, rank: int, *, fill: bool = False, modules: Sequence[str] = LINEAR
) -> Path:
    """Writes ``base`` in bf16, ``adapter`` on linear layers in fp32, and returns the mapping that merges them."""
    write_model(folder / "base", shape, fill=fill)
    write_adapter(folder / "adapter", shape.tensors(), rank, fill=fill, modules=modules)
    return _mapping(folder, _LORA)


def write_ties(folder: Path, shape: LlamaShape) -> Path:
    """Writes a base and three models in bf16, and returns the mapping that merges them."""
    return write_three(folder, shape, "ties")


def write_three(folder: Path, shape: LlamaShape, op: str) -> Path:
    """Writes three models in bf16, their base where the op has one, and returns the mapping that merges them."""
    based = op != "linear"
    for name in ("base", "a", "b", "c") if based else "abc":
        write_model(folder / name, shape)
    sources, base = ("base: base, ", 'base: "base:{rest...}", ') if based else ("", "")
    return _mapping(folder, _THREE.format(op=op, sources=sources, base=base, numbers=_NUMBERS[op]))


# What mergekit is told of each method; three models, or two and a base, as people write it.
_METHODS = {
    "linear": "models: [{a}, {b}, {c}]\nparameters: {{weight: 1.0}}\n",
    "slerp": "models: [{a}, {b}]\nbase_model: {path}/a\nparameters: {{t: [0.3, 0.7]}}\n",
    "ties": "models: [{a}, {b}, {c}]\nbase_model: {path}/base\nparameters: {{weight: 0.5, density: 0.5}}\n",
    "dare_ties": "models: [{a}, {b}, {c}]\nbase_model: {path}/base\nparameters: {{weight: 0.5, density: 0.5}}\n",
}
METHODS = tuple(_METHODS)


def write_merge(folder: Path, shape: LlamaShape, method: str) -> Path:
    """Writes filled models, ``merge.yml`` for mergekit, and the mapping that ``shardmerge init`` makes of it."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_model(folder / name, shape, fill=True, seed=seed)
    models = {name: f"{{model: {folder / name}}}" for name in "abc"}
    text = f"merge_method: {method}\ndtype: bfloat16\n" + _METHODS[method].format(path=folder, **models)
    (folder / "merge.yml").write_text(text, "utf-8")
    mapping = folder / "mapping.yaml"
    mapping.write_text(init(folder / "merge.yml", mapping=mapping).text, "utf-8")
    return mapping


def write_model(folder: Path, shape: LlamaShape, *, fill: bool = False, seed: int = 0) -> None:
    """Writes a LlamaForCausalLM directory that transformers loads."""
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", shape.tensors(), fill=fill, seed=seed)
    (folder / "config.json").write_text(model_config(shape), "utf-8")


def model_config(shape: LlamaShape) -> str:
    """Returns the config.json of a LlamaForCausalLM in bf16."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return json.dumps(config, indent=2)


def write_adapter(folder: Path, tensors: Shapes, rank: int, *, fill: bool, modules: Sequence[str]) -> None:
    """Writes a PEFT directory: a LoRA with an alpha of twice the rank."""
    folder.mkdir(parents=True)
    write_safetensors(folder / "adapter_model.safetensors", dict(_pairs(tensors, rank, modules)), "F32", fill=fill)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), "utf-8")


def _pairs(tensors: Shapes, rank: int, modules: Sequence[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            yield f"base_model.model.{module}.lora_A.weight", (rank, shape[1])
            yield f"base_model.model.{module}.lora_B.weight", (shape[0], rank)


def _mapping(folder: Path, text: str) -> Path:
    path = folder / "mapping.yaml"
    path.write_text(text, "utf-8")
    return path


WRITERS: dict[str, Callable[[Path, LlamaShape], Path]] = {
    "lora": lambda folder, shape: write_lora(folder, shape, 512),
    **{op: partial(write_three, op=op) for op in _NUMBERS},
}


def main() -> None:
    """Writes the inputs of one merge of an 8B model."""
    parser = argparse.ArgumentParser(description="Inputs of a merge, as holes.")
    parser.add_argument("kind", choices=WRITERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LLAMA_3_8B.layers)
    given = parser.parse_args()
    print(WRITERS[given.kind](given.folder, replace(LLAMA_3_8B, layers=given.layers)))


if __name__ == "__main__":
    main()
