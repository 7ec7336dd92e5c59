"""Every golden XTuner run in all three of XTuner's formats; two of them are loaded by the libraries that read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardmerge as sm
from tests.conftest import GOLDEN

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.24 for a property that warns of its end.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

XTUNER = GOLDEN / "xtuner"
CASES = sorted(path.parent.name for path in XTUNER.glob("*/case.json"))
BASES = {"llm": str(XTUNER / "base_llm"), "vision": str(XTUNER / "base_clip")}

# What XTuner's three formats call a tensor of the run: LLaVA's own names (llava_arch.py and builder.py of LLaVA)
# and transformers' legacy ones, both as in XTuner's LLM_PREFIX / VIT_PREFIX / PROJECTOR tables (model/llava.py).
OFFICIAL = {
    "llm.model.": "model.",
    "llm.lm_head.": "lm_head.",
    "visual_encoder.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "projector.model.": "model.mm_projector.",
}
TREE = {"llm.": "", "visual_encoder.": "visual_encoder/", "projector.": "projector/"}


def convert(case: str, form: str, folder: Path) -> Path:
    entry = XTUNER / case / json.loads((XTUNER / case / "case.json").read_text())["entry"]
    return sm.convert(entry, folder / form, use=f"xtuner/llava-to-{form}", bases=BASES).path


def truth(case: str) -> dict[str, torch.Tensor]:
    return load_file(XTUNER / case / "truth.safetensors")


def renamed(name: str, table: dict[str, str]) -> str:
    prefix = next(prefix for prefix in table if name.startswith(prefix))
    return table[prefix] + name.removeprefix(prefix)


def tree(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        place = path.parent.relative_to(folder).as_posix()
        prefix = "" if place == "." else f"{place}/"
        found |= {prefix + name: tensor for name, tensor in load_file(path).items()}
    return found


def trained_whole(case: str) -> dict[str, torch.Tensor]:
    """The tensors of a run that are no adapter's."""
    return {name: tensor for name, tensor in truth(case).items() if "base_model.model" not in name}


@pytest.mark.parametrize("case", CASES)
def test_huggingface(case: str, tmp_path: Path) -> None:
    out = convert(case, "hf", tmp_path)
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


@pytest.mark.parametrize("case", CASES)
def test_official(case: str, tmp_path: Path) -> None:
    out = convert(case, "official", tmp_path)
    made, config = tree(out), json.loads((out / "config.json").read_text())
    for name, tensor in trained_whole(case).items():
        assert torch.equal(made[renamed(name, OFFICIAL)].double(), tensor.double()), name
    tower = any(name.startswith("visual_encoder.") for name in truth(case))
    assert any("vision_tower" in name for name in made) == tower
    base = load_file(XTUNER / "base_llm" / "model.safetensors")
    assert {name for name in made if "vision_tower" not in name and "mm_projector" not in name} == set(base)
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert config["mm_hidden_size"] == 20
    assert config["mm_vision_select_layer"] == -2
    assert config["unfreeze_mm_vision_tower"] is tower
    assert config["vocab_size"] == len(base["model.embed_tokens.weight"])  # no token is added


@pytest.mark.parametrize("case", CASES)
def test_xtuner(case: str, tmp_path: Path) -> None:
    out = convert(case, "xtuner", tmp_path)
    made = tree(out)
    whole = {renamed(name, TREE): tensor for name, tensor in trained_whole(case).items()}
    assert {name for name in made if "adapter/" not in name} == set(whole)
    for name, tensor in whole.items():
        assert torch.equal(made[name].double(), tensor.double()), name
    assert json.loads((out / "projector" / "config.json").read_text())["model_type"] == "projector"
    parts = {name.split(".", 1)[0] for name in truth(case)}
    adapted = {name.split(".", 1)[0] for name in truth(case) if ".lora_" in name}
    assert (out / "config.json").exists() == ("llm" in parts - adapted)
    if "llm" in parts - adapted:
        _, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if "visual_encoder" in parts - adapted:
        loaded = transformers.CLIPVisionModel.from_pretrained(out / "visual_encoder", output_loading_info=True)
        assert not any(loaded[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loaded[1]
    for part, kind in (("llm", transformers.LlamaForCausalLM), ("visual_encoder", transformers.CLIPVisionModel)):
        folder = out / f"{part}_adapter"
        assert folder.exists() == (part in adapted)
        if part in adapted:
            _check_adapter(case, part, kind, folder)


def _check_adapter(case: str, part: str, kind: type, folder: Path) -> None:
    """Peft loads it onto the base, finds every key, and takes the values of the run."""
    base = kind.from_pretrained(BASES["llm" if part == "llm" else "vision"])
    if part == "visual_encoder" and not hasattr(base, "vision_model"):
        # transformers 5.6 dropped the level that the model which was trained had.
        wrapper = torch.nn.Module()
        wrapper.vision_model = base
        base = wrapper
    model = peft.PeftModel.from_pretrained(base, folder)
    loaded = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    expected = {name.removeprefix(f"{part}."): t for name, t in truth(case).items() if name.startswith(f"{part}.")}
    assert set(loaded) == set(expected)
    for name, tensor in loaded.items():
        assert torch.equal(tensor.double(), expected[name].double()), name
    config = peft.PeftConfig.from_pretrained(folder)
    stated = {"llm": (4, 8), "visual_encoder": (2, 1)}[part] if case == "lora_both" else (config.r, config.lora_alpha)
    assert (config.r, config.lora_alpha) == stated


def test_xtuner_itself_wrote_the_same_where_it_could(tmp_path: Path) -> None:
    """`xtuner convert pth_to_hf --save-format huggingface` of the run with a trained encoder: names and shapes."""
    theirs = load_file(XTUNER / "single_trainvit" / "to_hf_huggingface.safetensors")
    ours = tree(convert("single_trainvit", "hf", tmp_path))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
