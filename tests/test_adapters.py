"""Adapters merged into their bases, against peft's own ``merge_and_unload`` of the same adapter.

float32: both add ``scale * B @ A`` up in float32 and differ in the order of the sum alone. With u = 2**-24, a sum of r
products is within ``r * u * sum|b||a|`` of the true one in any order; the product with the scale and the addition round
once more, each by u of their result. Both sides may be off by that much, so the bound is twice it.

bfloat16: ours is the float32 sum rounded once, peft's is rounded twice more: it casts the delta to the adapter's type,
and adds it to the weight in bfloat16.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import shardmerge as sm
from tests.conftest import GOLDEN, read_all, shardmerge

State = dict[str, torch.Tensor]
U32, U16 = 2.0**-24, 2.0**-8  # half the distance from 1 to the next number


def llama(*, tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
        )
    )  # fmt: skip


def clip() -> nn.Module:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=12, n_layer=2, n_head=2))


class Mixed(nn.Module):
    """A module of every kind that peft's LoRA knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 5, kernel_size=(3, 2))
        self.point = nn.Conv2d(5, 4, kernel_size=1)
        self.line = nn.Conv1d(4, 7, kernel_size=3)
        self.linear = nn.Linear(7, 9)
        self.grouped = nn.Conv2d(4, 8, kernel_size=3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A base, and what peft is asked to put on it."""

    base: Callable[[], nn.Module]
    config: Mapping[str, object]
    warn: tuple[str, ...] = field(default_factory=tuple)


def lora(base: Callable[[], nn.Module], *targets: str, **settings: object) -> Case:
    return Case(base, {"r": 4, "lora_alpha": 12, "target_modules": list(targets), **settings})


CASES = {
    "linear": lora(llama, *ALL),
    "tied": lora(lambda: llama(tied=True), *ALL),
    "clip": lora(clip, "q_proj", "v_proj", "fc1", "fc2"),
    "rslora": lora(llama, *ALL, use_rslora=True),
    "dora": lora(llama, *ALL, use_dora=True),
    "dora and rslora": lora(llama, *ALL, use_dora=True, use_rslora=True),
    "embedding": lora(llama, "embed_tokens", "q_proj"),
    "dora on an embedding": lora(llama, "embed_tokens", "q_proj", use_dora=True),
    "modules to save": lora(llama, "q_proj", modules_to_save=["lm_head", "embed_tokens"]),
    "lora bias": lora(llama, "q_proj", "v_proj", lora_bias=True),
    "bias all": lora(llama, "q_proj", bias="all"),
    "bias lora_only": lora(llama, "q_proj", "k_proj", bias="lora_only"),
    "patterns": lora(
        llama, *ALL,
        rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 8, "model.layers.1.self_attn.q_proj": 6},
        alpha_pattern={"q_proj": 3, "mlp.up_proj": 7},
    ),
    "patterns and rslora": lora(llama, *ALL, rank_pattern={"o_proj": 9}, alpha_pattern={"o_proj": 5}, use_rslora=True),
    "fan in fan out": lora(gpt2, "c_attn", "c_proj", "c_fc", fan_in_fan_out=True),
    "fan in fan out, dora": lora(gpt2, "c_attn", "c_fc", fan_in_fan_out=True, use_dora=True),
    "fan in fan out and an embedding": lora(gpt2, "c_attn", "wte", fan_in_fan_out=True),
    "conv": lora(Mixed, "conv", "point", "line", "linear", "embed"),
    "conv, dora": lora(Mixed, "conv", "point", "line", "linear", use_dora=True),
    "conv with groups": lora(Mixed, "grouped"),
}  # fmt: skip


def adapted(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> PeftModel:
    """The base with an adapter on it that changes something: peft starts with B = 0."""
    torch.manual_seed(seed)
    base = case.base().to(dtype)
    if base.__class__ is Mixed:
        base.config = {"model_type": "custom", "tie_word_embeddings": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**case.config), autocast_adapter_dtype=False)
    stir(model)
    return model


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand_like(parameter)
            elif parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


def base_of(model: PeftModel) -> State:
    """The weights below the adapter, as the base's own directory has them."""
    found: State = {}
    for name, tensor in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if ".lora_" not in name and ".modules_to_save." not in name:
            found[plain] = tensor.detach().clone()
    return found


def untied(state: State, model: nn.Module) -> State:
    """A file has one copy of what is tied."""
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    return {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


def write_base(model: PeftModel, folder: Path) -> State:
    """Writes the base as it was before any training, and returns what it holds."""
    state = untied(base_of(model), model.get_base_model())
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return state


def truth_of(model: PeftModel) -> State:
    """What peft makes of it; the model is used up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    return untied({name: tensor.detach() for name, tensor in merged.state_dict().items()}, merged)


def save(model: PeftModel, folder: Path, how: str) -> Path:
    """Saves the adapter as peft does, or the whole model as a training framework does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "whole":
            model.save_pretrained(folder)
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for path in folder.glob("adapter_model.*"):
                path.unlink()
            torch.save(state, folder / "whole.pth")
            return folder / "whole.pth"
        model.save_pretrained(folder, safe_serialization=how == "safetensors", save_embedding_layers=False)
    return folder


MAPPING = """\
shardmerge: 1
sources: {{base: {base}, adapter: {adapter}}}
adapters: [{adapters}]
tensors:
  "{{rest...}}": base:{{rest...}}
"""


def write_mapping(folder: Path, base: Path, adapter: Path, extra: str = "") -> Path:
    path = folder / "mapping.yaml"
    entry = "{from: adapter, onto: base" + extra + "}"
    path.write_text(MAPPING.format(base=base, adapter=adapter, adapters=entry), "utf-8")
    return path


def merge(folder: Path, base: Path, adapter: Path, extra: str = "") -> dict[str, np.ndarray]:
    out = folder / "out"
    sm.run(write_mapping(folder, base, adapter, extra), out, options=sm.Options(sync=False))
    return read_all(sm.inspect(out))


def said_by_hand(case: Case) -> str:
    """A state dict has no config beside it: the mapping says what it says, where one number says it."""
    words = {"lora_alpha": "alpha", "use_rslora": "rslora", "fan_in_fan_out": "fan_in_fan_out"}
    return "".join(f", {word}: {str(case.config[key]).lower()}" for key, word in words.items() if key in case.config)


def bounds(before: State, model: PeftModel) -> dict[str, torch.Tensor]:
    """For every adapted weight the most that two float32 sums of any order may differ; see above."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "scaling"):
            continue
        weight = before[f"{name}.weight"].double()
        embedding = "default" in module.lora_embedding_A
        a = module.lora_embedding_A["default"] if embedding else module.lora_A["default"].weight
        b = module.lora_embedding_B["default"] if embedding else module.lora_B["default"].weight
        size = b.double().abs().flatten(1) @ a.double().abs().flatten(1)
        turned = embedding or getattr(module, "fan_in_fan_out", False)
        size = (size.T if turned else size).reshape(-1) * module.scaling["default"]
        if size.numel() != weight.numel():  # groups
            size = size.max().expand(weight.numel())
        total = weight.abs() + size.reshape(weight.shape)
        bound = 2 * U32 * ((a.shape[0] + 1) * size.reshape(weight.shape) + total)
        if "default" in module.lora_magnitude_vector:
            bound = _grown(bound, total, weight, module, turned=turned)
        found[f"{name}.weight"] = bound
    return found


def _grown(
    bound: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, module: nn.Module, *, turned: bool
) -> torch.Tensor:
    """DoRA multiplies by magnitude / norm. A norm of n squares is off by n/2 + 2 roundings at most, and by its terms."""
    magnitude = module.lora_magnitude_vector["default"].weight.double()
    scale = module.scaling["default"]
    delta = module.get_delta_weight("default").double() if scale else 0
    merged = weight + delta
    rows = merged.T if turned and merged.ndim == 2 else merged
    norm = rows.flatten(1).norm(dim=1)
    factor = (magnitude.reshape(-1) / norm).abs()
    noise = (bound.T if turned and bound.ndim == 2 else bound).flatten(1)
    spread = (noise.norm(dim=1) / norm + U32 * (rows[0].numel() + 8))[:, None] * rows.flatten(1).abs()
    grown = 2 * factor[:, None] * (noise + spread)
    return (grown.T if turned and bound.ndim == 2 else grown).reshape(bound.shape)


def assert_close(found: Mapping[str, np.ndarray], truth: State, allowed: Mapping[str, torch.Tensor]) -> None:
    """Bit by bit, but for what was multiplied."""
    assert set(found) == set(truth)
    changed = 0
    for name, tensor in truth.items():
        ours = torch.from_numpy(np.asarray(found[name]).astype(np.float64))
        off = (ours - tensor.double()).abs()
        limit = allowed.get(name, torch.zeros(()))
        assert ours.shape == tensor.shape
        assert (off <= limit).all(), f"{name}: {off.max():.3g} of {limit.max():.3g}"
        changed += name in allowed
    assert changed == len(allowed)


@pytest.mark.parametrize("how", ["safetensors", "bin", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_float32_is_what_peft_merges(name: str, how: str, tmp_path: Path) -> None:
    case = CASES[name]
    if how == "whole" and "patterns" in name:
        pytest.skip("patterns stand in the config alone, and a state dict has none")
    model = adapted(case)
    before = write_base(model, tmp_path / "base")
    adapter = save(model, tmp_path / "adapter", how)
    limits = bounds(before, model)
    if "lora_bias" in case.config:
        limits |= {key.replace(".weight", ".bias"): torch.tensor(1e-6) for key in limits}
    truth = truth_of(model)
    extra = said_by_hand(case) if how == "whole" else ""
    if how == "whole" and name == "conv with groups":
        extra += ""
    found = merge(tmp_path, tmp_path / "base", adapter, extra)
    assert_close(found, truth, limits)
    assert any(not torch.equal(truth[key], before[key]) for key in truth)
