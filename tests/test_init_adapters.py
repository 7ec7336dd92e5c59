"""`init` of adapters: named as one, with the base that they were trained on, and what it writes is peft's merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.recognition.proposal import Proposal
from tests.conftest import GOLDEN
from tests.families import made

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of what peft calls


def trained(
    folder: Path, kind: str = "GPTNeoXForCausalLM", *, modules: str = "query_key_value"
) -> dict[str, torch.Tensor]:
    """Saves a base and an adapter on it, every value drawn, and returns what peft merges."""
    base = made(kind)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=[modules], init_lora_weights=False))
    model.save_pretrained(folder / "lora")
    model.merge_and_unload().save_pretrained(folder / "truth")
    return load_file(folder / "truth" / "model.safetensors")


def written(folder: Path, source: Path, **options: object) -> Proposal:
    proposal = api.init(source, mapping=folder / "m.yaml", **options)
    (folder / "m.yaml").write_text(proposal.text.replace("out/model", "out"), "utf-8")
    return proposal


def run(folder: Path, *filled: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Runs the mapping, after what it says is to be filled in."""
    text = (folder / "m.yaml").read_text("utf-8")
    for blank, value in filled:
        assert blank in text
        text = text.replace(blank, value)
    (folder / "m.yaml").write_text(text, "utf-8")
    sm.run(folder / "m.yaml", options=sm.Options(sync=False))
    return load_file(folder / "out" / "model.safetensors")


def close(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> bool:
    same = (torch.allclose(found[name], truth[name], rtol=1e-6, atol=1e-7) for name in found)
    return found.keys() == truth.keys() and all(same)


def test_a_peft_directory_with_the_base_that_it_names(tmp_path: Path) -> None:
    truth = trained(tmp_path)
    proposal = written(tmp_path, tmp_path / "lora")
    assert "# Recognised: PEFT adapter. To: hf/model." in proposal.text
    assert "GPT-NeoX" in proposal.text  # the base
    assert "- {from: adapter, onto: base}" in proposal.text
    assert proposal.notes == ()
    assert close(run(tmp_path), truth)


def test_a_base_that_is_not_here_is_asked_for(tmp_path: Path) -> None:
    truth = trained(tmp_path)
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/base"}))
    proposal = written(tmp_path, tmp_path / "lora")
    assert any("adapter_config.json names 'org/base'" in note for note in proposal.notes)
    assert close(run(tmp_path, ("FILL_IN_base", str(tmp_path / "base"))), truth)


def test_a_base_of_the_command_line_goes_first(tmp_path: Path) -> None:
    trained(tmp_path)
    text = written(tmp_path, tmp_path / "lora", bases={"base": str(GOLDEN / "xtuner" / "base_llm")}).text
    assert "xtuner/base_llm" in text
    assert str(tmp_path / "base") not in text


def test_a_relative_base_is_that_of_the_adapter_or_of_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = trained(tmp_path)
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "../base"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert written(tmp_path, tmp_path / "lora").notes == ()
    assert close(run(tmp_path), truth)


def test_an_adapter_without_a_config_asks_for_its_alpha(tmp_path: Path) -> None:
    truth = trained(tmp_path)
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    torch.save({name.replace(".weight", ".default.weight"): one for name, one in state.items()}, tmp_path / "last.pt")
    proposal = written(tmp_path, tmp_path / "last.pt", bases={"base": str(tmp_path / "base")})
    assert proposal.notes == ("the adapter's `alpha` is missing: no file says it",)
    assert close(run(tmp_path, ("FILL_IN_alpha", "3")), truth)


def test_a_wrapped_adapter(tmp_path: Path) -> None:
    truth = trained(tmp_path)
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    torch.save({f"module.{name}": one for name, one in state.items()}, tmp_path / "last.pt")
    proposal = written(tmp_path, tmp_path / "last.pt", bases={"base": str(tmp_path / "base")})
    assert 'strip: ["module."]' in proposal.text
    assert close(run(tmp_path, ("FILL_IN_alpha", "3")), truth)


def test_other_ways_from_an_adapter_are_said() -> None:
    adapter = GOLDEN / "layouts" / "torchtune_llama3_lora" / "truth" / "adapter"
    assert "# Another way from here: `use: peft/export`" in api.init(adapter).text
    assert "use: llama/hf-to-hf" in api.init(adapter, to="hf/llama").text


def test_the_llm_of_an_xtuner_run(tmp_path: Path) -> None:
    """Its alpha stands in the training config inside of the file, its names behind `llm.`."""
    run_ = GOLDEN / "xtuner" / "lora_llm" / "work_dirs" / "iter_2.pth"
    proposal = written(tmp_path, run_, to="hf/model", bases={"base": str(GOLDEN / "xtuner" / "base_llm")})
    assert '{from: "adapter:llm.{rest...}", onto: base}' in proposal.text
    sm.plan(tmp_path / "m.yaml")


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_holds_its_base(named: bool, tmp_path: Path) -> None:
    """A whole state dict; peft 0.5 and older called the weight below an adapter like any other."""
    base = made("MptForCausalLM")
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["Wqkv"], init_lora_weights=False))
    state = {
        name if named else name.replace(".base_layer", ""): one.clone() for name, one in model.state_dict().items()
    }
    torch.save(state, tmp_path / "last.pt")
    proposal = written(tmp_path, tmp_path / "last.pt")
    assert "Recognised: LoRA run that holds its frozen base" in proposal.text
    assert "- {from: run, onto: run, alpha: FILL_IN_alpha}" in proposal.text
    found = run(tmp_path, ("FILL_IN_alpha", "3"))
    truth = model.merge_and_unload().state_dict()
    assert close(found, {name: one for name, one in truth.items() if name in found})
    assert "transformer.blocks.0.attn.Wqkv.weight" in found


MLX = {"model.layers.0.self_attn.q_proj.lora_a": (4, 2), "model.layers.0.self_attn.q_proj.lora_b": (2, 4)}
KOHYA = {"lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": (2, 4), "lora_unet_down_blocks_0_attn1_to_q.alpha": ()}
DIFFUSERS = {"unet.blocks.0.attn1.to_q.lora_A.weight": (2, 4), "unet.blocks.0.attn1.to_q.lora_B.weight": (4, 2)}


@pytest.mark.parametrize(("shapes", "name"), [(MLX, "mlx"), (KOHYA, "kohya"), (DIFFUSERS, "diffusers")])
def test_adapters_of_others_are_called_by_their_name(
    shapes: dict[str, tuple[int, ...]], name: str, tmp_path: Path
) -> None:
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "lora.safetensors")
    text = api.init(tmp_path / "lora.safetensors").text
    assert name in text.partition("Recognised: ")[2].splitlines()[0]
    assert "onto: base" in text


# Adapter, base, and what the tool itself merges (golden/make/make_adapters.py).
TOOLS = {
    "mlx_lora": ("adapter", "llama/model.safetensors", "truth"),
    "mlx_dora": ("adapter", "llama/model.safetensors", "truth"),
    "lycoris_locon": ("adapter.safetensors", "llama/model.safetensors", "truth"),
    "lycoris_loha": ("adapter.safetensors", "llama/model.safetensors", "truth"),
    "lycoris_lokr_conv": ("adapter.safetensors", "clip/model.safetensors", "truth"),
    "kohya": ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet_truth"),
    "diffusers_old": ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet_truth"),
    "diffusers_new": ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet_truth"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_adapters_of_other_tools(tool: str, tmp_path: Path) -> None:
    adapter, base, truth = TOOLS[tool]
    folder = GOLDEN / "adapters"
    given = folder / "bases" / base
    text = written(tmp_path, folder / tool / adapter, bases={"base": str(given)}).text
    assert tool.split("_", maxsplit=1)[0] in text.split("Recognised: ")[1].splitlines()[0].lower()
    found, changed = run(tmp_path), load_file(folder / tool / f"{truth}.safetensors")
    assert all(torch.allclose(found[name], one, rtol=1e-5, atol=1e-6) for name, one in changed.items())
    untouched = load_file(given)
    assert all(torch.equal(found[name], one) for name, one in untouched.items() if name not in changed)
