"""What `init` names: the tensors of 79 models as three versions of transformers call them, on disk and in memory.

``golden/layout_names.json.gz`` is written by transformers itself (``golden/make/make_layout_names.py``). What `init`
writes for them is run as it stands, and keeps every tensor.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.dtypes import DTYPES
from shardmerge.recognition.recognised import recognise
from shardmerge.recognition.table import layout_table
from shardmerge.tensors import Catalog, TensorEntry
from tests.conftest import GOLDEN
from tests.families import made

MODELS = json.loads(gzip.decompress((GOLDEN / "layout_names.json.gz").read_bytes()))

# What config.json alone tells from a LLaMA, or from another model of the same names.
LIKE_ANOTHER = {
    "gemma": "Gemma", "granite": "Granite", "smollm3": "SmolLM3",
}  # fmt: skip
# Names that the table does not have: config.json names them, and nothing does without it.
ELSE = {"deberta-v2", "distilbert", "electra", "albert", "swin", "segformer", "wav2vec2"}
# The beginning of what a model is called.
CALLED = {
    "LlavaForConditionalGeneration": "Hugging Face LLaVA", "LlavaForConditionalGeneration, Pixtral": "Pixtral",
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT", "LlavaOnevisionForConditionalGeneration": "LLaVA-OneVision",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL", "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL", "Qwen3VLMoeForConditionalGeneration": "Qwen3-VL-MoE",
    "Gemma3ForConditionalGeneration": "Gemma 3 with images", "PaliGemmaForConditionalGeneration": "PaliGemma",
    "MllamaForConditionalGeneration": "Mllama", "InternVLForConditionalGeneration": "InternVL of transformers",
    "Idefics2ForConditionalGeneration": "Idefics 2", "Idefics3ForConditionalGeneration": "Idefics 3",
    "Mistral3ForConditionalGeneration": "Mistral 3", "VipLlavaForConditionalGeneration": "VipLLaVA",
    "LlamaForCausalLM": "Hugging Face LLaMA", "MistralForCausalLM": "Hugging Face LLaMA",
    "Qwen2ForCausalLM": "Hugging Face LLaMA", "Qwen3ForCausalLM": "Qwen3", "MixtralForCausalLM": "Mixtral",
    "Qwen2MoeForCausalLM": "Qwen2-MoE", "Qwen3MoeForCausalLM": "Qwen3-MoE", "DeepseekV3ForCausalLM": "DeepSeek",
    "GemmaForCausalLM": "Gemma", "Gemma2ForCausalLM": "Gemma 2", "Gemma3ForCausalLM": "Gemma 3",
    "GraniteForCausalLM": "Granite", "Olmo2ForCausalLM": "OLMo 2", "Phi3ForCausalLM": "Hugging Face Phi-3",
    "GPT2LMHeadModel": "GPT-2", "GPTNeoXForCausalLM": "GPT-NeoX", "GPTJForCausalLM": "GPT-J", "OPTForCausalLM": "OPT",
    "BertForMaskedLM": "BERT", "WhisperForConditionalGeneration": "Whisper", "CLIPModel": "Hugging Face CLIP",
    "CLIPVisionModel": "Hugging Face CLIP vision tower", "SiglipModel": "SigLIP", "Dinov2Model": "DINOv2",
}  # fmt: skip


def catalog(shapes: Mapping[str, tuple[int, ...]], front: str = "") -> Catalog:
    entries = {f"{front}{name}": TensorEntry(name, DTYPES["BF16"], tuple(shape), ()) for name, shape in shapes.items()}
    return Catalog("x", "safetensors", entries)


def every_set() -> Iterator[tuple[str, str, dict[str, list[int]]]]:
    for kind, told in MODELS.items():
        for one in told["sets"]:
            yield kind, told["model_type"], one["tensors"]


def test_every_model_is_named_by_its_config_and_by_its_names() -> None:
    for kind, model_type, shapes in every_set():
        stated = recognise(catalog(shapes), {"model_type": model_type})
        alone = recognise(catalog(shapes))
        assert stated.title.startswith(CALLED.get(kind, "")), (kind, stated.title)
        assert stated.title, kind
        assert not stated.remarks, (kind, stated.remarks)
        if model_type in LIKE_ANOTHER:
            assert alone.title.startswith("Hugging Face LLaMA"), (kind, alone.title)
        else:
            assert alone.title == ("" if model_type in ELSE else stated.title), (kind, alone.title)
        assert (alone.wrappers, alone.outside) == ((), ())
        assert len(alone.layouts) == len(stated.layouts) or model_type in LIKE_ANOTHER, kind


def test_no_model_has_the_layout_of_another_tool() -> None:
    """Or a hint would lead to a preset that makes something else of it."""
    for kind, _, shapes in every_set():
        assert all(one.model_types for one in recognise(catalog(shapes)).layouts), kind


FRONTS = (
    "module.", "_orig_mod.", "_forward_module.", "model.", "pretrained_model.", "module._orig_mod.",
    "_forward_module.model.",
)  # fmt: skip


@pytest.mark.parametrize("front", FRONTS)
def test_wrappers_are_seen_through(front: str) -> None:
    for kind, _, shapes in every_set():
        bare, wrapped = recognise(catalog(shapes)), recognise(catalog(shapes, front))
        if bare.layouts:
            assert wrapped.title == bare.title, (kind, front)
            assert "".join(sorted(wrapped.wrappers)) == "".join(sorted(front.replace(".", ". ").split())), kind


def test_what_stands_beside_a_wrapped_model_is_told() -> None:
    shapes = MODELS["LlamaForCausalLM"]["sets"][0]["tensors"]
    both = {f"pretrained_model.{name}": shape for name, shape in shapes.items()} | {"v_head.summary.weight": (1, 24)}
    found = recognise(catalog(both))
    assert found.title.startswith("Hugging Face LLaMA")
    assert (found.wrappers, found.outside) == (("pretrained_model.",), ("v_head.summary.weight",))


# --- config.json and names ---


def test_a_config_that_contradicts_the_names() -> None:
    shapes = MODELS["LlavaOnevisionForConditionalGeneration"]["sets"][0]["tensors"]
    found = recognise(catalog(shapes), {"model_type": "qwen2_vl"})
    assert found.layouts == ()
    assert found.title == "Qwen2-VL"
    assert found.remarks == ("config.json says `qwen2_vl`, Qwen2-VL, and the names are those of LLaVA-OneVision",)


def test_a_config_of_a_type_that_is_not_known() -> None:
    shapes = MODELS["LlamaForCausalLM"]["sets"][0]["tensors"]
    found = recognise(catalog(shapes), {"model_type": "exaone4"})
    assert (found.layouts, found.title) == ((), "a model of the type 'exaone4'")
    assert "the names are those of Hugging Face LLaMA" in found.remarks[0]


def test_a_tool_keeps_its_layout_beside_a_config() -> None:
    """torchtune writes its names beside the config.json of the model that it began with."""
    shapes = {"layers.0.attn.q_proj.weight": (4, 4), "tok_embeddings.weight": (8, 4)}
    assert recognise(catalog(shapes), {"model_type": "llama"}).title == "torchtune"


def test_the_table_says_each_layout_once() -> None:
    names = [one.name for one in layout_table().layouts]
    assert len(set(names)) == len(names)


# --- what is written, run ---


def kept(folder: Path, source: Path, out: Path, **options: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Runs what `init` writes as it stands, and returns it with the tensors it made."""
    proposal = api.init(source, mapping=folder / "m.yaml", **options)
    (folder / "m.yaml").write_text(proposal.text.replace("out/model", str(out)), "utf-8")
    sm.run(folder / "m.yaml", options=sm.Options(sync=False))
    return proposal.text, load_file(out / "model.safetensors")


def drawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tuple(shape)) for name, shape in shapes.items()}


def same(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)


WRITTEN = [
    (kind, number)
    for kind, told in MODELS.items()
    for number, one in enumerate(told["sets"])
    if "Conditional" in kind or (kind in ("GPTJForCausalLM", "Dinov2Model", "T5", "MptForCausalLM") and number == 0)
]


def test_the_mapping_keeps_every_tensor(tmp_path: Path) -> None:
    for kind, number in WRITTEN:
        tensors = drawn(MODELS[kind]["sets"][number]["tensors"])
        folder = tmp_path / f"{kind}-{number}"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        text, found = kept(folder, folder / "model.safetensors", folder / "out", to="same-names")
        assert same(found, tensors), kind
        assert text.count("\n  # ") >= text.count(": source:"), kind  # each rule says what it takes


WHOLE = (
    "GPTNeoXForCausalLM", "MixtralForCausalLM", "Qwen2VLForConditionalGeneration", "SwinModel",
    "Gemma3ForConditionalGeneration",
)  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_a_directory_is_kept_whole(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path / "in")
    _, found = kept(tmp_path, tmp_path / "in", tmp_path / "out", to="same-names")
    assert same(found, load_file(tmp_path / "in" / "model.safetensors"))
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.to_dict()["model_type"] == model.config.model_type


ODD = {
    "several last words": {"norm.weight": (2,), "norm.bias": (2,), "norm.scale": (1,)},
    "numbers at the end and words": {"x.0": (2,), "x.1": (2,), "x.weight": (2,), "x.bias": (3,)},
    "a number of a number": {"blocks.0.1.weight": (2,), "blocks.0.10.weight": (3,), "blocks.1.0.bias": (2,)},
    "nothing but numbers": {"0.weight": (2, 2), "2.weight": (3, 2), "2.bias": (3,)},
    "no dots": {"a": (2,), "b": (3,), "lora_te_text": (1,)},
    "letters of YAML and templates": {"a{b}.w": (1,), "a: b.w": (2,), "#c.w": (3,), "ä.0.w": (1,), "x y.0.z": (2,)},
    "a name that another begins with": {"a.0": (1,), "a.0.b": (2,), "a.0.b.c": (3,), "a.b": (4,)},
    "many of a kind": {f"m{i}.weight": (1,) for i in range(80)},
    "many heads": {f"heads.h{i}.{p}": (1,) for i in range(70) for p in ("w", "b")},
    "long numbers": {"a.12345678901.w": (1,), "a.007.w": (2,)},
}


@pytest.mark.parametrize("case", ODD)
def test_any_names_are_grouped(case: str, tmp_path: Path) -> None:
    tensors = drawn(ODD[case])
    save_file(tensors, tmp_path / "model.safetensors")
    text, found = kept(tmp_path, tmp_path / "model.safetensors", tmp_path / "out")
    assert same(found, tensors), text
    assert text.count(": source:") + text.count('"source:') <= 60


def test_wrappers_stand_in_the_mapping(tmp_path: Path) -> None:
    """A model of TRL's with its value head, compiled: the head is dropped by name, and all else is the model."""
    tensors = drawn(MODELS["GPT2LMHeadModel"]["sets"][0]["tensors"])
    wrapped = {f"module.pretrained_model._orig_mod.{name}": one for name, one in tensors.items()}
    torch.save(wrapped | {"module.v_head.weight": torch.ones(1, 24)}, tmp_path / "last.pt")
    text, found = kept(tmp_path, tmp_path / "last.pt", tmp_path / "out")
    assert "# Recognised: GPT-2." in text
    assert 'strip: ["_orig_mod.", "module.", "pretrained_model."]' in text
    assert '- "source:v_head.weight"' in text
    assert same(found, tensors)


def test_a_preset_gets_the_names_without_wrappers(tmp_path: Path) -> None:
    source = next((GOLDEN / "layouts" / "litgpt_llama_gqa" / "source").glob("*.pth"))
    state = torch.load(source, weights_only=True)
    folder = tmp_path / "lit"
    folder.mkdir()
    torch.save(
        {f"_forward_module.model.{name}": one for name, one in state.get("model", state).items()}, folder / source.name
    )
    (folder / "model_config.yaml").write_bytes((source.parent / "model_config.yaml").read_bytes())
    _, found = kept(tmp_path, folder / source.name, tmp_path / "out", to="hf/llama")
    assert same(found, load_file(GOLDEN / "layouts" / "litgpt_llama_gqa" / "truth" / "model.safetensors"))


def test_a_plain_conversion_of_wrapped_names_points_to_init(tmp_path: Path) -> None:
    state = {"module.transformer.h.0.attn.qkv.weight": (6, 2), "module.transformer.wte.weight": (4, 2)}
    torch.save(drawn(state), tmp_path / "last.pt")
    (warning,) = sm.convert(tmp_path / "last.pt", tmp_path / "out").plan.warnings
    assert (
        warning
        == f"the names are those of a wrapped litgpt: `shardmerge init {tmp_path / 'last.pt'}` writes a mapping for it"
    )


# Of each format one, with tensors of every kind: what init writes for names that nobody knows, run as it stands.
FORMATS = (
    "zero/bag_z3_w3_bf16", "zero/bag_z1_w3_bf16", "dcp/fsdp2_bag_w3_fp32", "ranks/fsdp2_bag_w3_fp32",
    "pipeline/pp2_tied_z1_w2_bf16", "parallel/moe_z2_ep2_w2_bf16", "universal/bag_z3_w3_bf16",
    "distributed_safetensors/fsdp2_bag_w3",
)  # fmt: skip


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_is_kept(case: str, tmp_path: Path) -> None:
    folder = GOLDEN / case
    entry = json.loads((folder / "case.json").read_text("utf-8")).get("entry", "ckpt")
    _, found = kept(tmp_path, folder / entry, tmp_path / "out", to="same-names")
    truth = load_file(folder / "truth.safetensors")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name].float(), truth[name].float()) for name in truth)


# Golden layouts that one preset leads away from, and what has to be filled in.
ROADS = {
    "internvl_qwen2": "", "litgpt_llama_gqa": "", "meta_llama3_tp4_gqa": "", "open_clip_published": "",
    "megatron_tp2_pp2_gqa": "FILL_IN_base", "torch_dist_mixtral_ep2": "FILL_IN_base",
}  # fmt: skip


@pytest.mark.parametrize("case", ROADS)
def test_the_preset_of_a_layout_gives_what_the_tool_gives(case: str, tmp_path: Path) -> None:
    folder = GOLDEN / "layouts" / case
    entry = json.loads((folder / "case.json").read_text("utf-8"))["entry"]
    text = api.init(folder / entry, mapping=tmp_path / "m.yaml").text
    assert [word for word in text.split() if word.startswith("FILL_IN")] == ([ROADS[case]] if ROADS[case] else [])
    text = text.replace("FILL_IN_base", str(folder / "truth")).replace("out/model", "out")
    (tmp_path / "m.yaml").write_text(text, "utf-8")
    sm.run(tmp_path / "m.yaml", options=sm.Options(sync=False))
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "truth" / "model.safetensors"))
