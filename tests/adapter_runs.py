"""Adapters made by peft on tiny models of transformers, their bases on disk, and what peft makes of both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import shardmerge as sm
from tests.conftest import read_all

State = dict[str, torch.Tensor]
IDS = torch.arange(1, 9)[None]
WEIGHTS = "adapter_model.safetensors"


def llama(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | settings)).eval()


def gpt2(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes | {"tie_word_embeddings": False} | settings)).eval()


def saved(model: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def opened(model: nn.Module, folder: Path) -> nn.Module:
    """What transformers reads of a base."""
    return type(model).from_pretrained(folder).eval()


def trained(base: nn.Module, folder: Path | None = None, seed: int = 1, **settings: object) -> PeftModel:
    """A LoRA run on a base, saved as peft saves it: every trainable tensor has moved."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**config))
        shaken(model, seed)
        if folder is not None:
            model.save_pretrained(folder)
    return model.eval()


def shaken(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1.2)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def change_config(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder: Path, change: Mapping[str, torch.Tensor | None]) -> None:
    """Replaces tensors of an adapter, or takes those away that are None."""
    state = load_file(folder / WEIGHTS) | change
    save_file({name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}, folder / WEIGHTS)


def merge(folder: Path, *, base: str = "base", adapter: str = "lora", said: str = "") -> dict[str, np.ndarray]:
    """The result of peft/merge, or of a mapping with more words under ``adapters:``."""
    write_mapping(folder, [f"from: {adapter}, onto: {base}{said}"], base, [adapter])
    sm.run(folder / "mapping.yaml", options=sm.Options(sync=False))
    return read_all(sm.inspect(folder / "out"))


def refused(folder: Path, *, base: str = "base", adapter: str = "lora", said: str = "") -> str:
    """The error of a merge that publishes nothing."""
    write_mapping(folder, [f"from: {adapter}, onto: {base}{said}"], base, [adapter])
    return refusal(folder)


def refusal(folder: Path) -> str:
    """The text of what is wrong with the mapping there."""
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.run(folder / "mapping.yaml", options=sm.Options(sync=False))
    assert not (folder / "out").exists()
    assert caught.value.exit_code == 1
    return " ".join(str(caught.value).split())


def write_mapping(folder: Path, adapters: list[str], base: str, sources: list[str]) -> Path:
    named = {base.replace(".", "_"): base} | {one.replace(".", "_"): one for one in sources}
    listed = ", ".join(f"{{{one}}}" for one in adapters)
    for name, path in named.items():
        listed = listed.replace(f"from: {path}", f"from: {name}").replace(f"onto: {path}", f"onto: {name}")
    text = (
        "shardmerge: 1\noutput: out\n"
        f"sources: {{{', '.join(f'{name}: {path}' for name, path in named.items())}}}\n"
        f"target: {{name: hf/model, text: {base}}}\nadapters: [{listed}]\n"
        f'tensors: {{"{{rest...}}": "{base}:{{rest...}}"}}\n'
    )
    path = folder / "mapping.yaml"
    path.write_text(text, "utf-8")
    return path


def assert_same(found: Mapping[str, np.ndarray], truth: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Every tensor, up to the order of a float32 sum of four products."""
    assert set(found) == set(truth)
    for name, tensor in truth.items():
        ours = torch.from_numpy(np.asarray(found[name]).astype(np.float64))
        assert ours.shape == tensor.shape, name
        assert (ours - tensor.detach().double()).abs().max() <= tolerance, name


def merged_state(model: PeftModel) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: tensor.detach().clone() for name, tensor in model.merge_and_unload().state_dict().items()}


def base_state(model: PeftModel) -> State:
    """The weights below an adapter, under the base's names."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor.detach().clone()
        for name, tensor in model.get_base_model().state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
