"""Adapters as peft saves them, packed weights as quantization libraries name them, and TorchScript archives."""

from __future__ import annotations

import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import shardmerge as sm
from shardmerge.tensors.packed import packed_weights
from tests.conftest import read_all, same_values, shardmerge

State = dict[str, torch.Tensor]


def assert_holds(catalog: sm.Catalog, tensors: State) -> None:
    found = read_all(catalog)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert same_values(found[name], tensor.detach().double().numpy()), name


# --- adapters ---


@pytest.fixture(scope="module")
def adapted() -> PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        return get_peft_model(base, lora)


def saved(adapted: PeftModel, folder: Path, *, safe: bool = True) -> State:
    adapted.save_pretrained(folder, safe_serialization=safe)
    if safe:
        return load_file(folder / "adapter_model.safetensors")
    tensors: State = torch.load(folder / "adapter_model.bin", weights_only=True)
    return tensors


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_directory(adapted: PeftModel, tmp_path: Path, *, safe: bool) -> None:
    tensors = saved(adapted, tmp_path, safe=safe)
    for path in (tmp_path, tmp_path / f"adapter_model.{'safetensors' if safe else 'bin'}"):
        catalog = sm.inspect(path)
        assert_holds(catalog, tensors)
        assert catalog.kind == "PEFT adapter"
        assert "adapter_config.json" in catalog.side_files
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors


def test_an_adapter_before_the_full_model_beside_it(adapted: PeftModel, tmp_path: Path) -> None:
    tensors = saved(adapted, tmp_path)
    full = {"w": torch.ones(2)}
    save_file(full, tmp_path / "model.safetensors")
    catalog = sm.inspect(tmp_path)
    assert_holds(catalog, tensors)
    assert catalog.warnings == (
        f"the adapter is read, not the full model beside it: pass {tmp_path}/model.safetensors for that",
    )
    assert_holds(sm.inspect(tmp_path / "model.safetensors"), full)
    (tmp_path / "adapter_model.safetensors").unlink()
    catalog = sm.inspect(tmp_path)
    assert_holds(catalog, full)
    assert catalog.notes == ("adapter_config.json lies here without an adapter: the full model is read",)


def test_an_adapter_without_weights(adapted: PeftModel, tmp_path: Path) -> None:
    saved(adapted, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    stderr = shardmerge("inspect", tmp_path, code=1).stderr
    assert "[missing-adapter]" in stderr
    assert "expected: adapter_model.safetensors or adapter_model.bin" in stderr


def test_a_llava_lora_directory(adapted: PeftModel, tmp_path: Path) -> None:
    """LLaVA's train.py saves the projector apart, with names of its wrapped model."""
    tensors = saved(adapted, tmp_path)
    projector = {"base_model.model.model.mm_projector.0.weight": torch.randn(8, 4)}
    torch.save(projector, tmp_path / "non_lora_trainables.bin")
    adapted.config.save_pretrained(tmp_path)
    catalog = sm.inspect(tmp_path)
    assert_holds(catalog, tensors)
    assert "non_lora_trainables.bin holds what was trained beside the adapter" in catalog.notes[0]
    assert {"config.json", "adapter_config.json"} <= set(catalog.side_files)
    other = sm.inspect(tmp_path / "non_lora_trainables.bin")
    assert_holds(other, projector)
    assert other.kind == "torch zip"


def test_an_adapter_alone_is_not_converted(adapted: PeftModel, tmp_path: Path) -> None:
    saved(adapted, tmp_path / "adapter")
    assert "[adapter-alone]" in shardmerge("convert", tmp_path / "adapter", tmp_path / "out", code=1).stderr
    assert not (tmp_path / "out").exists()


# --- packed weights ---

BYTES = torch.zeros(8, 1, dtype=torch.uint8)
CODES = torch.zeros(2, 4, dtype=torch.int32)
PLAIN = torch.zeros(4, 4)

# Names and shapes as the libraries save them; sources in shardmerge/tensors/packed.py.
PACKED: dict[str, tuple[State, list[str]]] = {
    "bitsandbytes nf4": (
        {
            "q.weight": BYTES,
            "q.weight.absmax": torch.zeros(1),
            "q.weight.quant_map": torch.zeros(16),
            "q.weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
            "norm.weight": torch.zeros(4),
        },
        ["q.weight"],
    ),
    "bitsandbytes fp4, stored as bfloat16, absmax quantized too": (
        {
            "q.weight": torch.zeros(4, 1).bfloat16(),
            "q.weight.absmax": torch.zeros(1, dtype=torch.uint8),
            "q.weight.nested_absmax": torch.zeros(1),
            "q.weight.quant_state.bitsandbytes__fp4": torch.zeros(90, dtype=torch.uint8),
        },
        ["q.weight"],
    ),
    "bitsandbytes without its state": (
        {"q.base_layer.weight": BYTES, "q.lora_A.weight": PLAIN},
        ["q.base_layer.weight"],
    ),
    "bitsandbytes int8": (
        {"q.weight": PLAIN.to(torch.int8), "q.SCB": torch.zeros(4), "q.weight_format": torch.tensor(0).byte()},
        ["q.weight"],
    ),
    "GPTQ": (
        {"q.qweight": CODES, "q.qzeros": CODES, "q.scales": PLAIN.half(), "q.g_idx": CODES[0], "o.weight": PLAIN},
        ["q.qweight"],
    ),
    "AWQ at the top level": ({"qweight": CODES, "qzeros": CODES, "scales": PLAIN.half()}, ["qweight"]),
    "compressed-tensors": ({"q.weight_packed": CODES, "q.weight_scale": PLAIN}, ["q.weight_packed"]),
    "plain": (
        {
            "a.weight": PLAIN,
            "one.weight": torch.zeros(8, 1),
            "mask": BYTES,
            "rows.weight": torch.zeros(8, 2, dtype=torch.uint8),
            "code.weight": PLAIN.to(torch.int8),
            "x.qweight": PLAIN,
            "x.scales": PLAIN,
        },
        [],
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_named_and_still_listed(tmp_path: Path, kind: str) -> None:
    state, packed = PACKED[kind]
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    catalog = sm.inspect(tmp_path / "x.safetensors")
    assert set(catalog.entries) == set(state)
    assert list(packed_weights(catalog)) == packed


# --- TorchScript ---


def test_a_torch_script_archive_is_refused_with_a_command_that_works(tmp_path: Path) -> None:
    """What OpenAI publishes of CLIP is such an archive."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    path = tmp_path / "ViT B.pt"
    program = (
        "import sys, warnings, torch\n"
        "warnings.simplefilter('ignore')\n"
        "module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))\n"
        "module.load_state_dict(torch.load(sys.argv[1]))\n"
        "torch.jit.save(torch.jit.trace(module, torch.ones(1, 3)), sys.argv[2])\n"
    )
    torch.save(module.state_dict(), tmp_path / "state.pth")
    subprocess.run([sys.executable, "-c", program, tmp_path / "state.pth", path], check=True)
    with pytest.raises(sm.CheckpointError) as caught:
        sm.inspect(path)
    assert caught.value.code == "torchscript"
    command = shlex.split(caught.value.hint.partition(": ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, "-W", "ignore", *command[1:]], check=True, cwd=tmp_path)
    assert_holds(sm.inspect(tmp_path / "ViT B-state.pth"), module.state_dict())
