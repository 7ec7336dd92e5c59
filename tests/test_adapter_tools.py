"""Adapters of other kinds and other tools: LoHa and LoKr of peft, LyCORIS, kohya, diffusers, mlx-lm, unsloth."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import shardmerge as sm
from shardmerge.ops.lycoris import LoHa, LoKr, ScaleBy
from tests.adapter_runs import (
    WEIGHTS,
    assert_same,
    change_config,
    change_tensors,
    llama,
    merge,
    merged_state,
    opened,
    refused,
    saved,
    shaken,
    trained,
)
from tests.conftest import read_all
from tests.op_harness import execute

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def clip() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)).eval()


def lycoris(base: nn.Module, folder: Path, config: PeftConfig) -> dict[str, torch.Tensor]:
    """Saves a run of peft, and returns what peft merges."""
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    shaken(model)
    model.save_pretrained(folder)
    return merged_state(model)


LLAMA = {"r": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
CONVOLUTION = {"r": 3, "alpha": 6, "target_modules": ["patch_embedding", "fc1"]}
RUNS = {
    "loha": (llama, LoHaConfig(**LLAMA)),
    "loha patterns": (llama, LoHaConfig(**LLAMA, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 3})),
    "loha random start": (llama, LoHaConfig(**LLAMA, init_weights=False)),
    "loha head": (llama, LoHaConfig(**LLAMA, modules_to_save=["lm_head"])),
    "loha convolution": (clip, LoHaConfig(**CONVOLUTION)),
    "loha effective convolution": (clip, LoHaConfig(**CONVOLUTION, use_effective_conv2d=True)),
    "lokr": (llama, LoKrConfig(**LLAMA)),
    "lokr both": (llama, LoKrConfig(**LLAMA | {"r": 1}, decompose_both=True)),
    "lokr whole": (llama, LoKrConfig(**LLAMA | {"r": 64})),
    "lokr factor": (llama, LoKrConfig(**LLAMA | {"r": 2}, decompose_factor=4)),
    "lokr patterns": (llama, LoKrConfig(**LLAMA, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})),
    "lokr lycoris start": (llama, LoKrConfig(**LLAMA, init_weights="lycoris")),
    "lokr convolution": (clip, LoKrConfig(**CONVOLUTION | {"r": 1})),
    "lokr effective convolution": (clip, LoKrConfig(**CONVOLUTION | {"r": 1}, use_effective_conv2d=True)),
    "lokr whole convolution": (clip, LoKrConfig(**CONVOLUTION | {"r": 64})),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_product_of_lycoris_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    make, config = RUNS[case]
    base = make()
    saved(base, tmp_path / "base")
    truth = lycoris(opened(base, tmp_path / "base"), tmp_path / "lora", config)
    assert any((truth[name] != one).any() for name, one in base.state_dict().items())
    assert_same(merge(tmp_path), truth)


@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_a_bfloat16_base_is_rounded_once(tmp_path: Path, case: str) -> None:
    """peft rounds its product first: one step of the result's type apart, at most."""
    make, config = RUNS[case]
    base = make().to(torch.bfloat16)
    saved(base, tmp_path / "base")
    truth = lycoris(opened(base, tmp_path / "base"), tmp_path / "lora", config)
    assert_same(merge(tmp_path), truth, 2**-8)


@pytest.mark.parametrize("weight", [0.5, -1.0])
def test_a_weight_counts_here_too(tmp_path: Path, weight: float) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    truth = lycoris(opened(base, tmp_path / "base"), tmp_path / "lora", LoHaConfig(**LLAMA))
    untouched = base.state_dict()
    expected = {name: untouched[name] + weight * (one - untouched[name]) for name, one in truth.items()}
    assert_same(merge(tmp_path, said=f", weight: {weight}"), expected)


@pytest.mark.parametrize("part", ["hada_w1_a", "hada_w2_b"])
def test_a_missing_factor_is_named(tmp_path: Path, part: str) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    lycoris(opened(base, tmp_path / "base"), tmp_path / "lora", LoHaConfig(**LLAMA))
    names = [name for name in load_file(tmp_path / "lora" / WEIGHTS) if part in name]
    change_tensors(tmp_path / "lora", {names[0]: None})
    said = refused(tmp_path)
    assert "[adapter-incomplete]" in said
    assert part in said


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "ScaleBy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_product_by_its_contract(kind: str, dtype: type) -> None:
    """Tiles give the bits of the whole, in the memory that is promised; the harness compares."""
    rng = np.random.default_rng(0)
    shapes = {
        "LoHa": ((70, 3), (3, 24), (70, 2), (2, 24), (70, 24)),
        "LoKr": ((7, 4), (10, 6), (70, 24)),
        "ScaleBy": ((70, 24), ()),
    }[kind]
    arrays = [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    wide = [one.astype(np.float64) for one in arrays]
    op, truth = {
        "LoHa": (LoHa(0.5), lambda a, b, c, d, base: base + 0.5 * (a @ b) * (c @ d)),
        "LoKr": (LoKr(0.5), lambda a, b, base: base + 0.5 * np.kron(a, b)),
        "ScaleBy": (ScaleBy(), lambda a, b: a * b),
    }[kind]
    whole = execute(op, arrays)
    np.testing.assert_allclose(whole.array, truth(*wide), rtol=1e-6, atol=1e-6)
    for tile in (1, 24 * 33):
        assert execute(op, arrays, tile).array.tobytes() == whole.array.tobytes()


# --- unsloth writes peft's files


def test_an_adapter_of_unsloth_is_one_of_peft(tmp_path: Path) -> None:
    """Its ``auto_mapping`` says so, its target_modules are an expression (unsloth 2025.9, ``get_peft_regex``)."""
    base = llama()
    saved(base, tmp_path / "base")
    targets = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj).*?)|"
    )
    targets += (
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))"
    )
    model = trained(opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=targets)
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    change_config(tmp_path / "lora", auto_mapping=mapping)
    assert_same(merge(tmp_path), merged_state(model))


# --- parts without peft's prefix


def test_parts_without_a_prefix_ask_for_alpha(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), tmp_path / "lora")
    state = load_file(tmp_path / "lora" / WEIGHTS)
    bare = {name.removeprefix("base_model.model."): one for name, one in state.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    assert "[unknown-alpha]" in refused(tmp_path, adapter="bare.safetensors")
    assert_same(merge(tmp_path, adapter="bare.safetensors", said=", alpha: 8"), merged_state(model))


# --- other tools, each against what it merges itself (tests/golden/make/make_adapters.py)

GOLDEN = Path(__file__).parent / "golden" / "adapters"
TOOLS = {
    "mlx_lora": ("llama", "adapter", ""),
    "mlx_dora": ("llama", "adapter", ""),
    "mlx_embedding": ("llama", "adapter", ""),
    "lycoris_locon": ("llama", "adapter.safetensors", ""),
    "lycoris_rslora": ("llama", "adapter.safetensors", ""),
    "lycoris_loha": ("llama", "adapter.safetensors", ""),
    "lycoris_lokr": ("llama", "adapter.safetensors", ""),
    "lycoris_lokr_whole": ("llama", "adapter.safetensors", ""),
    "lycoris_loha_conv": ("clip", "adapter.safetensors", ""),
    "lycoris_loha_tucker": ("clip", "adapter.safetensors", ""),
    "lycoris_lokr_conv": ("clip", "adapter.safetensors", ""),
    "kohya unet": ("unet", "pytorch_lora_weights.safetensors", ""),
    "kohya text_encoder": ("text_encoder", "pytorch_lora_weights.safetensors", ""),
    "diffusers_old unet": ("unet", "pytorch_lora_weights.safetensors", "unet."),
    "diffusers_old text_encoder": ("text_encoder", "pytorch_lora_weights.safetensors", "text_encoder."),
    "diffusers_new unet": ("unet", "pytorch_lora_weights.safetensors", "unet."),
    "diffusers_new text_encoder": ("text_encoder", "pytorch_lora_weights.safetensors", "text_encoder."),
}


PIPELINES = ("kohya", "diffusers_old", "diffusers_new")


def mapping(folder: Path, case: str, base: str, adapter: str, prefix: str, said: str = "") -> Path:
    """A mapping over a golden adapter: a pipeline has two models, and one file for both."""
    name = case.split(maxsplit=1)[0]
    file = "diffusion_pytorch_model.safetensors" if base == "unet" else "model.safetensors"
    text = (
        "shardmerge: 1\noutput: out\n"
        f"sources: {{base: {GOLDEN / 'bases' / base / file}, lora: {GOLDEN / name / adapter}}}\n"
        f'adapters: [{{from: "lora:{prefix}{{rest...}}", onto: base{said}}}]\n'
        'tensors: {"{rest...}": "base:{rest...}"}\n'
    )
    if base in ("unet", "text_encoder"):
        others = {"unet": ("lora_te1_", "text_encoder."), "text_encoder": ("lora_unet_", "unet.")}[base]
        other = f"{others[0]}" if name == "kohya" else others[1]
        rest = "{flat}.{rest...}" if name == "kohya" else "{rest...}"
        text += f'drop: ["lora:{other}{rest}"]\n'
    path = folder / "mapping.yaml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("case", TOOLS)
def test_an_adapter_of_another_tool_is_merged_as_the_tool_does(tmp_path: Path, case: str) -> None:
    base, adapter, prefix = TOOLS[case]
    sm.run(mapping(tmp_path, case, base, adapter, prefix), options=sm.Options(sync=False))
    found = read_all(sm.inspect(tmp_path / "out"))
    name = case.split(maxsplit=1)[0]
    file = "diffusion_pytorch_model.safetensors" if base == "unet" else "model.safetensors"
    changed = load_file(
        GOLDEN / name / (f"{base}_truth.safetensors" if prefix or name == "kohya" else "truth.safetensors")
    )
    truth = load_file(GOLDEN / "bases" / base / file) | changed
    assert changed
    assert_same(found, truth, 1e-5)


def test_one_file_goes_into_both_models_of_a_pipeline(tmp_path: Path) -> None:
    """Each takes what is its own by kohya's names; nothing needs to be dropped."""
    folder, lora = GOLDEN / "bases", GOLDEN / "kohya" / "pytorch_lora_weights.safetensors"
    (tmp_path / "mapping.yaml").write_text(
        "shardmerge: 1\noutput: out\nsources:\n"
        f"  unet: {folder / 'unet' / 'diffusion_pytorch_model.safetensors'}\n"
        f"  text: {folder / 'text_encoder' / 'model.safetensors'}\n  lora: {lora}\n"
        "adapters: [{from: lora, onto: unet}, {from: lora, onto: text}]\n"
        'tensors: {"unet.{rest...}": "unet:{rest...}", "text.{rest...}": "text:{rest...}"}\n',
        "utf-8",
    )
    sm.run(tmp_path / "mapping.yaml", options=sm.Options(sync=False))
    found = read_all(sm.inspect(tmp_path / "out"))
    for part, name in (("unet", "unet"), ("text", "text_encoder")):
        truth = load_file(GOLDEN / "kohya" / f"{name}_truth.safetensors")
        assert_same({one: found[f"{part}.{one}"] for one in truth}, truth, 1e-5)


def test_alpha_of_the_mapping_stands_in_place_of_the_one_beside(tmp_path: Path) -> None:
    path = mapping(tmp_path, "lycoris_locon", "llama", "adapter.safetensors", "", ", alpha: 4")  # 2 in the file
    sm.run(path, options=sm.Options(sync=False))
    found = read_all(sm.inspect(tmp_path / "out"))
    base = load_file(GOLDEN / "bases" / "llama" / "model.safetensors")
    truth = load_file(GOLDEN / "lycoris_locon" / "truth.safetensors")
    assert_same(
        {name: found[name] for name in truth}, {name: 2 * one - base[name] for name, one in truth.items()}, 1e-5
    )


def refusal_of(path: Path) -> str:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.run(path, options=sm.Options(sync=False))
    return " ".join(str(caught.value).split())


def test_parts_that_are_not_merged_are_named_with_their_tool(tmp_path: Path) -> None:
    """LyCORIS's DoRA takes its norm otherwise than peft's."""
    said = refusal_of(mapping(tmp_path, "lycoris_dora", "llama", "adapter.safetensors", ""))
    assert "[unknown-adapter-tensor]" in said
    assert "kohya or LyCORIS" in said
    assert "dora_scale" in said


def test_flattened_names_of_another_base_are_said(tmp_path: Path) -> None:
    said = refusal_of(mapping(tmp_path, "lycoris_loha", "clip", "adapter.safetensors", ""))
    assert "[adapter-without-base]" in said
    assert "kohya's names" in said


@pytest.mark.parametrize("change", [{"fine_tune_type": "full"}, {"lora_parameters": None}])
def test_mlx_beyond_lora_is_refused_by_its_name(tmp_path: Path, change: dict[str, object]) -> None:
    shutil.copytree(GOLDEN / "mlx_lora" / "adapter", tmp_path / "adapter")
    change_config(tmp_path / "adapter", **change)
    path = mapping(tmp_path, "mlx_lora", "llama", "adapter", "")
    path.write_text(path.read_text().replace(str(GOLDEN / "mlx_lora" / "adapter"), str(tmp_path / "adapter")))
    said = refusal_of(path)
    assert "[not-lora]" in said
    assert "mlx-lm" in said


def test_a_scale_of_mlx_that_is_no_number(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "mlx_lora" / "adapter", tmp_path / "adapter")
    change_config(tmp_path / "adapter", lora_parameters={"rank": 4, "alpha": 8})
    path = mapping(tmp_path, "mlx_lora", "llama", "adapter", "")
    path.write_text(path.read_text().replace(str(GOLDEN / "mlx_lora" / "adapter"), str(tmp_path / "adapter")))
    assert "lora_parameters.scale" in refusal_of(path)
