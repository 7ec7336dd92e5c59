"""XTuner's own default: LoRA on an InternLM2 and on a SigLIP, and an InternLM2 that was trained whole."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardmerge as sm
from tests.llava_pairs import split
from tests.test_llava_pairs import make_text, make_vision

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
CONFIG = """model = dict(
    type='xtuner.model.LLaVAModel', freeze_llm=True, freeze_visual_encoder=True, token_merge_ratio=1,
    llm=dict(pretrained_model_name_or_path='internlm/internlm2-chat-7b'),
    llm_lora=dict(type='peft.LoraConfig', r=2, lora_alpha=4, bias='none'),
    visual_encoder=dict(type='transformers.SiglipVisionModel.from_pretrained'),
    visual_encoder_lora=dict(type='peft.LoraConfig', r=2, lora_alpha=1, bias='none'))
"""
Tensors = dict[str, "torch.Tensor"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("parts")
    return {"llm": make_text(home / "llm", "internlm2"), "vision": make_vision(home / "vision", "siglip_vision_model")}


def projector() -> Tensors:
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    return {f"projector.model.{name}": torch.randn(shape) for name, shape in shapes.items()}


def adapted(base: Tensors, prefix: str, scale: float, modules: tuple[str, ...]) -> tuple[Tensors, Tensors]:
    """An adapter under XTuner's names, and the base with it, said again in torch."""
    adapter, merged = {}, dict(base)
    for name, weight in base.items():
        if name.endswith(modules):
            a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
            module = f"{prefix}base_model.model.{name.removesuffix('.weight')}"
            adapter |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
            merged[name] = (weight.double() + scale * (b.double() @ a.double())).float()
    return adapter, merged


def converted(home: Path, trained: Tensors, parts: dict[str, Path], config: str = "") -> Tensors:
    torch.save({"state_dict": trained, "meta": {"cfg": config}}, home / "iter_1.pth")
    bases = {role: str(folder) for role, folder in parts.items()}
    out = sm.convert(home / "iter_1.pth", home / "out", use="xtuner/llava-to-hf", bases=bases).path
    return safetensors.load_file(Path(out) / "model.safetensors")


def test_adapters_are_merged_before_the_fused_attention_is_split(parts: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    text, vision = (safetensors.load_file(parts[role] / "model.safetensors") for role in ("llm", "vision"))
    vision = {f"vision_model.{name.removeprefix('vision_model.')}": one for name, one in vision.items()}
    llm_lora, llm = adapted(text, "llm.", 2.0, ("wqkv.weight", "wo.weight", "w1.weight", "w2.weight", "w3.weight"))
    vision_lora, tower = adapted(vision, "visual_encoder.", 0.5, ("q_proj.weight", "fc1.weight"))
    found = converted(tmp_path, llm_lora | vision_lora | projector(), parts, CONFIG)
    wanted = {f"language_model.{name}": one for name, one in split(llm, HEADS).items()}
    wanted |= {f"vision_tower.{name}": one for name, one in tower.items()}
    assert {name for name in found if not name.startswith("multi_modal")} == set(wanted)
    assert all(torch.equal(found[name], one) for name, one in wanted.items())


def test_one_that_was_trained_whole_comes_from_the_checkpoint(parts: dict[str, Path], tmp_path: Path) -> None:
    text = {name: one + 1 for name, one in safetensors.load_file(parts["llm"] / "model.safetensors").items()}
    found = converted(tmp_path, {f"llm.{name}": one for name, one in text.items()} | projector(), parts)
    assert all(torch.equal(found[f"language_model.{name}"], one) for name, one in split(text, HEADS).items())
