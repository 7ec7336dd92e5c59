"""`shardmerge init`: layouts of real tools are told apart, and what it writes is a mapping that plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.mapping.preset_files import list_presets, load_preset
from shardmerge.mapping.reader import parse_spec
from shardmerge.recognition.recognised import recognise
from shardmerge.recognition.table import layout_table
from shardmerge.recognition.unsaid import unsaid_numbers
from shardmerge.targets.registry import TARGETS
from tests.conftest import GOLDEN, shardmerge

REAL = GOLDEN / "layouts"
XTUNER = GOLDEN / "xtuner"

# What real tools saved, and the beginning of the layout's name.
SAVED = {
    "layouts/litgpt_llama_gqa/source": "litgpt",
    "layouts/litgpt_old_llama_gqa/source": "litgpt",
    "layouts/meta_llama2_tp1_mha/source": "Meta's LLaMA",
    "layouts/meta_llama3_tp4_gqa/source": "Meta's LLaMA",
    "layouts/open_clip_published/source": "OpenAI's CLIP",
    "layouts/open_clip_trained/source": "OpenAI's CLIP",
    "layouts/open_clip_trained/truth": "Hugging Face CLIP",
    "layouts/torchtune_llama3_lora/source/base.pt": "torchtune",
    "layouts/torchtune_llama3_lora/source/epoch_0/adapter_model.pt": "LoRA adapter of torchtune",
    "layouts/torchtune_llama3_lora/truth/adapter": "PEFT adapter",
    "layouts/torchtune_phi3_gqa/truth": "Hugging Face Phi-3",
    "layouts/litgpt_llama_gqa/truth": "Hugging Face LLaMA",
    "xtuner/base_llm": "Hugging Face LLaMA",
    "xtuner/base_clip": "Hugging Face CLIP",
    "xtuner/frozen_z2/work_dirs/iter_2.pth": "XTuner LLaVA",
    "xtuner/pretrain_z2/work_dirs/iter_2.pth": "XTuner LLaVA",
}


@pytest.mark.parametrize("path", SAVED)
def test_what_tools_saved_is_recognised(path: str) -> None:
    (layout,) = recognise(sm.inspect(GOLDEN / path)).layouts
    assert layout.name.startswith(SAVED[path])


def test_what_shardmerge_made_is_recognised(tmp_path: Path) -> None:
    bases = {"llm": str(XTUNER / "base_llm"), "vision": str(XTUNER / "base_clip")}
    run = XTUNER / "frozen_z2" / "work_dirs" / "iter_2.pth"
    names = ["xtuner/llava-to-hf"]
    made = sm.convert(run, tmp_path / "legacy", use=names[0], bases=bases).path
    found = {"legacy": recognise(sm.inspect(made)).layouts}
    for preset in ("hf/to-4.52", "hf/to-5.6", "llava/hf-to-official"):
        found[preset] = recognise(sm.inspect(sm.convert(made, tmp_path / preset[-4:], use=preset).path)).layouts
    assert {key: [layout.name[:60] for layout in layouts] for key, layouts in found.items()} == {
        "legacy": ["Hugging Face LLaVA, legacy names (transformers 4.36 to 4.51,"],
        "hf/to-4.52": ["Hugging Face LLaVA, names of transformers 4.52 to 5.5"],
        "hf/to-5.6": ["Hugging Face LLaVA, names of transformers 5.6 and later"],
        "llava/hf-to-official": ["official LLaVA (LlavaLlamaForCausalLM)"],
    }


# Names as Megatron's, InternVL's and LLaVA's own code writes them; no real file of these is small.
WRITTEN = {
    "Megatron-Core": {"00.000.decoder.layers.0.self_attention.linear_qkv.weight": (8, 4)},
    "InternVL": {
        "vision_model.encoder.layers.0.attn.qkv.weight": (12, 4),
        "mlp1.0.weight": (4,),
        "language_model.model.layers.0.attention.wqkv.weight": (8, 4),
    },
    "projector of an official LLaVA": {"model.mm_projector.0.weight": (4, 4), "model.mm_projector.0.bias": (4,)},
    "official LLaVA with an image_newline": {
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.embed_tokens.weight": (8, 4),
        "model.mm_projector.0.weight": (4, 4),
        "model.image_newline": (4,),
    },
    "Hugging Face CLIP vision tower": {
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4),
        "vision_model.embeddings.class_embedding": (4,),
    },
}


def save(path: Path, shapes, dtype=torch.float32) -> Path:
    save_file({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("layout", WRITTEN)
def test_names_alone(layout: str, tmp_path: Path) -> None:
    (found,) = recognise(sm.inspect(save(tmp_path / "model.safetensors", WRITTEN[layout]))).layouts
    assert found.name.startswith(layout)


def test_shapes_count_too(tmp_path: Path) -> None:
    """4-bit weights are flat bytes under the same names, and no LLaMA that a preset could convert."""
    shapes = {"model.layers.0.self_attn.q_proj.weight": (8, 1), "model.embed_tokens.weight": (8, 1)}
    assert recognise(sm.inspect(save(tmp_path / "model.safetensors", shapes, torch.uint8))).layouts == ()


# --- the table ---


def test_the_table_is_sound() -> None:
    known = list_presets()
    for layout in layout_table().layouts:
        for road in layout.roads:
            assert road.preset in known, road.preset
            preset = load_preset(road.preset)
            assert not road.role or road.role in preset.roles
            assert road.to or (preset.target is not None and preset.target.name in TARGETS)
        roads = [load_preset(road.preset) for road in layout.roads]
        assert all(any(role in preset.roles for preset in roads) for role in layout.needs)


def test_numbers_that_a_preset_leaves_to_the_user() -> None:
    found = {name: unsaid_numbers(load_preset(name)) for name in list_presets()}
    assert {name: numbers for name, numbers in found.items() if numbers} == {"llama/torchtune-lora-to-hf": ("scale",)}


# --- what it writes ---

# Checkpoint, bases, target: what it writes must plan as it is.
WHOLE = [
    ("layouts/litgpt_llama_gqa/source", {}, ""),
    ("layouts/meta_llama3_tp2_gqa/source", {}, ""),
    ("layouts/open_clip_trained/source", {}, "hf/clip"),
    ("layouts/torchtune_llama3_lora/source/base.pt", {"base": "layouts/torchtune_llama3_lora/truth"}, "hf/llama"),
    ("layouts/torchtune_phi3_gqa/truth", {}, "llama/phi3-to-llama"),
    ("layouts/meta_llama3_tp2_gqa/truth", {}, "meta/llama"),
    ("layouts/meta_llama3_tp2_gqa/truth", {}, "torchtune"),
    ("layouts/open_clip_trained/truth", {}, "open_clip"),
    *(
        (f"layouts/torch_dist_{case}/source", {"base": f"layouts/torch_dist_{case}/truth"}, "")
        for case in ("llama_numbered_tp2", "qwen3_tp2", "mixtral_ep2", "qwen3_moe_ep2", "nemo1_tp2")
    ),
    ("xtuner/frozen_z2/work_dirs/iter_2.pth", {"llm": "xtuner/base_llm", "vision": "xtuner/base_clip"}, "hf/llava"),
    ("xtuner/lora_llm/work_dirs/iter_2.pth", {"llm": "xtuner/base_llm", "vision": "xtuner/base_clip"}, "hf/llava"),
    ("xtuner/pretrain_z2/work_dirs/iter_2.pth", {"llm": "xtuner/base_llm", "vision": "xtuner/base_clip"}, "hf/llava"),
]


@pytest.mark.parametrize(("path", "bases", "to"), WHOLE)
def test_the_mapping_plans(path: str, bases: dict[str, str], to: str, tmp_path: Path) -> None:
    named = {name: str(GOLDEN / base) for name, base in bases.items()}
    proposal = api.init(GOLDEN / path, bases=named, to=to, mapping=tmp_path / "m.yaml")
    assert not any("is missing" in note for note in proposal.notes)
    api.write_new(tmp_path / "m.yaml", proposal.text)
    plan = sm.plan(tmp_path / "m.yaml")
    assert sum(1 for _ in plan.tensors()) > 4
    assert str(GOLDEN / path) in proposal.text


def test_paths_are_relative_to_the_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "maps").mkdir()
    save(tmp_path / "in" / "clip.safetensors", WRITTEN["Hugging Face CLIP vision tower"])
    monkeypatch.chdir(tmp_path)
    text = api.init("in/clip.safetensors", mapping="maps/m.yaml").text
    assert parse_spec(text, "m.yaml").sources["clip"].path == "../in/clip.safetensors"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    proposal = api.init(XTUNER / "pretrain_z2" / "work_dirs" / "iter_2.pth", to="hf/llava")
    spec = parse_spec(proposal.text, "m.yaml")
    assert {name: source.path for name, source in spec.sources.items() if name != "trained"} == {
        "llm": "FILL_IN_llm",
        "vision": "FILL_IN_vision",
    }
    assert [note.split(":")[0] for note in proposal.notes] == [
        "the source `llm` is missing",
        "the source `vision` is missing",
    ]
    assert all("the training config names" in note for note in proposal.notes)
    assert all(f"# Look at this: {note}" in proposal.text for note in proposal.notes)
    assert "# Another way from here: `use: xtuner/llava-to-official`" in proposal.text


def test_a_number_that_no_file_says_is_asked_for() -> None:
    adapter = REAL / "torchtune_llama3_lora" / "source" / "epoch_0" / "adapter_model.pt"
    proposal = api.init(adapter)
    assert "`let: {scale: NUMBER}` is missing: no file says it" in proposal.notes
    spec = parse_spec(proposal.text, "m.yaml")
    assert spec.variables["scale"].formula.text == "FILL_IN_scale"
    assert spec.sources["tune"].path == "FILL_IN_tune"


def test_a_base_with_other_rows_is_noted(tmp_path: Path) -> None:
    for name, rows in (("ours", 10), ("theirs", 8)):
        (tmp_path / name).mkdir()
        shapes = {"tok_embeddings.weight": (rows, 4), "layers.0.attn.q_proj.weight": (4, 4)}
        save(tmp_path / name / "model.safetensors", shapes)
    proposal = api.init(tmp_path / "ours", bases={"base": str(tmp_path / "theirs")}, to="hf/llama")
    assert any("the vocabularies differ in rows: 10 in tune, 8 in base" in note for note in proposal.notes)


# --- never in silence ---


def refused(*arguments, **options) -> sm.ShardmergeError:
    with pytest.raises(sm.ShardmergeError) as raised:
        api.init(*arguments, **options)
    return raised.value


def test_several_targets_are_listed() -> None:
    error = refused(XTUNER / "frozen_z2" / "work_dirs" / "iter_2.pth")
    assert (error.code, error.exit_code) == ("ambiguous-conversion", 1)
    assert all(f"--to {to}:" in error.hint for to in ("hf/llava", "official/llava", "xtuner/llava"))


def test_two_presets_for_one_target_are_listed_by_their_names(tmp_path: Path) -> None:
    bases = {"llm": str(XTUNER / "base_llm"), "vision": str(XTUNER / "base_clip")}
    run = XTUNER / "frozen_z2" / "work_dirs" / "iter_2.pth"
    made = sm.convert(run, tmp_path / "out", use="xtuner/llava-to-hf", bases=bases).path
    error = refused(made, to="hf/names")
    assert error.code == "ambiguous-conversion"
    assert "--to hf/to-4.52:" in error.hint
    assert "--to hf/to-5.6:" in error.hint
    assert "use: hf/to-5.6" in api.init(made, to="hf/to-5.6").text


def test_a_target_that_nothing_leads_to() -> None:
    error = refused(REAL / "litgpt_llama_gqa" / "source", to="hf/lama")
    assert (error.code, error.exit_code) == ("no-conversion", 1)
    assert "did you mean `hf/llama`" in error.hint


def test_no_tensors_no_layout(tmp_path: Path) -> None:
    error = refused(save(tmp_path / "model.safetensors", {}))
    assert (error.code, error.exit_code) == ("unknown-layout", 1)


def test_a_base_for_what_needs_none(tmp_path: Path) -> None:
    clip = save(tmp_path / "model.safetensors", {"encoder.weight": (2, 2)})
    assert refused(clip, bases={"base": str(clip)}).code == "unknown-source"


def test_a_base_that_the_preset_has_no_use_for() -> None:
    llm = str(XTUNER / "base_llm")
    error = refused(XTUNER / "frozen_z2" / "work_dirs" / "iter_2.pth", to="hf/llava", bases={"lmm": llm})
    assert (error.code, error.hint) == ("unknown-source", "did you mean `llm`?")
    error = refused(XTUNER / "frozen_z2" / "work_dirs" / "iter_2.pth", to="hf/llava", bases={"trained": llm})
    assert error.code == "unknown-source"


def test_on_the_command_line(tmp_path: Path) -> None:
    run = XTUNER / "frozen_z2" / "work_dirs" / "iter_2.pth"
    assert "[ambiguous-conversion]" in shardmerge("init", run, code=1).stderr
    mapping = tmp_path / "mapping.yaml"
    done = shardmerge("init", run, "--to", "hf/llava", "--base", f"llm={XTUNER / 'base_llm'}", "-o", mapping)
    assert "note: the source `vision` is missing" in done.stderr
    assert "[missing-path]" in shardmerge("plan", mapping, code=2).stderr
    mapping.write_text(mapping.read_text("utf-8").replace("FILL_IN_vision", str(XTUNER / "base_clip")), "utf-8")
    assert json.loads(shardmerge("plan", mapping, "--json").stdout)["plan"]["target"] == "hf/llava"
