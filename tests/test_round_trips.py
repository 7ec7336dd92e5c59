"""Presets and their ways back: there and back bit for bit, and the tool's own file where the tool goes both ways."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN
from tests.presets_in_use import LAYOUTS, Tensors, compare_bits, read_tensors, use_preset
from tests.test_layouts import CASES

META = [case for case in CASES if case.startswith("meta_")]
LITGPT = [case for case in CASES if case.startswith("litgpt_")]
OPEN_CLIP = [case for case in CASES if case.startswith("open_clip_")]


def truth(case: str) -> Path:
    """A Hugging Face directory, made by the tool of the case."""
    return LAYOUTS / case / "truth"


def saved(path: Path) -> Tensors:
    """Returns a torch file's state dict, below `model` or `state_dict` if it is there."""
    found = torch.load(path, weights_only=True)
    return found.get("model", found.get("state_dict", found))


# ---- the tools' own way back


def test_litgpt_gets_the_file_that_its_own_converter_makes(tmp_path: Path) -> None:
    for case in LITGPT:
        if "old" in case:
            continue  # the fused layout before 0.5 has no preset back
        found = read_tensors(use_preset("llama/hf-to-litgpt", {"hf": truth(case)}, tmp_path / case))
        compare_bits(found, saved(LAYOUTS / case / "source" / "lit_model.pth"))


def torchtune_file(case: str) -> Path:
    """The one file of torchtune's weights."""
    (path,) = (path for path in (LAYOUTS / case / "source").rglob("*") if path.is_file())
    return path


@pytest.mark.parametrize(
    ("case", "preset"),
    [("torchtune_llama3_gqa", "llama/hf-to-torchtune"), ("torchtune_phi3_gqa", "llama/hf-to-torchtune-phi3")],
)
def test_torchtune_gets_the_file_that_its_own_converter_makes(case: str, preset: str, tmp_path: Path) -> None:
    found = read_tensors(use_preset(preset, {"hf": truth(case)}, tmp_path / "out"))
    path = torchtune_file(case)
    compare_bits(found, load_file(path) if path.suffix == ".safetensors" else saved(path))


@pytest.mark.parametrize("case", [case for case in META if "tp" in case])
def test_meta_gets_its_own_shards(case: str, tmp_path: Path) -> None:
    """The oracle is Meta's layout as the golden case was cut; transformers has no way back."""
    source = LAYOUTS / case / "source"
    ranks = sorted(source.glob("consolidated.*.pth"))
    let = {"ranks": len(ranks), "embedding_dim": int("llama2" in case)}
    made = use_preset("llama/hf-to-meta", {"hf": truth(case)}, tmp_path / "out", let)
    for path in ranks:
        wanted = {name: one for name, one in saved(path).items() if name != "rope.freqs"}
        compare_bits(saved(made / path.name), wanted)


@pytest.mark.parametrize("case", OPEN_CLIP)
def test_open_clip_gets_its_own_names_and_bits(case: str, tmp_path: Path) -> None:
    found = read_tensors(use_preset("clip/hf-to-open-clip", {"hf": truth(case)}, tmp_path / "out"))
    (path,) = (path for path in (LAYOUTS / case / "source").iterdir() if path.suffix in (".bin", ".pt"))
    compare_bits(found, {name.removeprefix("module."): one for name, one in saved(path).items()})


# ---- there and back


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_meta_and_back(ranks: int, embedding_dim: int, tmp_path: Path) -> None:
    case = "meta_llama2_tp4_gqa" if ranks == 4 else "meta_llama3_tp2_gqa"
    let = {"ranks": ranks, "embedding_dim": embedding_dim}
    folder = use_preset("llama/hf-to-meta", {"hf": truth(case)}, tmp_path / "out", let)
    assert len(list(folder.glob("consolidated.*.pth"))) == ranks
    back = use_preset("llama/meta-to-hf", {"meta": folder}, tmp_path / "back")
    compare_bits(read_tensors(back), read_tensors(truth(case)))


# case, preset there, source of the preset back, preset back, what the way back needs
THERE_AND_BACK = [
    ("litgpt_llama_gqa", "llama/hf-to-litgpt", "lit", "llama/litgpt-to-hf", "model_config.yaml"),
    ("torchtune_llama3_gqa", "llama/hf-to-torchtune", "tune", "llama/torchtune-to-hf", "base"),
    ("torchtune_phi3_gqa", "llama/hf-to-torchtune-phi3", "tune", "llama/torchtune-phi3-to-hf", "base"),
    ("open_clip_published", "clip/hf-to-open-clip", "clip", "clip/open-clip-to-hf", "open_clip_config.json"),
]


@pytest.mark.parametrize(
    ("case", "there", "role", "back", "needs"), THERE_AND_BACK, ids=[row[1] for row in THERE_AND_BACK]
)
def test_there_and_back(case: str, there: str, role: str, back: str, needs: str, tmp_path: Path) -> None:
    """The file in the middle is a torch file, as the tools read it, and the sizes come from the tool's own config."""
    middle = use_preset(there, {"hf": truth(case)}, tmp_path / "middle", format="bin")
    sources = {role: middle}
    if needs == "base":
        sources["base"] = truth(case)
    else:
        shutil.copy(LAYOUTS / case / "source" / needs, middle)
    again = use_preset(back, sources, tmp_path / "again")
    compare_bits(read_tensors(again), read_tensors(truth(case)))


def test_phi3_as_llama_is_what_torchtune_keeps_apart(tmp_path: Path) -> None:
    """torchtune never fuses: its q, k, v, w1 and w3 are what the split must give."""
    case = "torchtune_phi3_gqa"
    found = read_tensors(use_preset("llama/phi3-to-llama", {"phi": truth(case)}, tmp_path / "out"))
    path = torchtune_file(case)
    apart = load_file(path) if path.suffix == ".safetensors" else saved(path)
    words = {
        "attn.output_proj.": "self_attn.o_proj.", "attn.": "self_attn.", "mlp.w1.": "mlp.gate_proj.",
        "mlp.w2.": "mlp.down_proj.", "mlp.w3.": "mlp.up_proj.", "sa_norm.scale": "input_layernorm.weight",
        "mlp_norm.scale": "post_attention_layernorm.weight",
    }  # fmt: skip
    tops = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.scale": "model.norm.weight",
            "output.weight": "lm_head.weight"}  # fmt: skip
    wanted = {}
    for name, one in apart.items():
        head = ".".join(name.split(".")[:2]) + "."
        tail = name.removeprefix(head)
        word = next((word for word in words if tail.startswith(word)), "")
        wanted[tops.get(name) or f"model.{head}{words[word]}{tail.removeprefix(word)}"] = one
    compare_bits(found, wanted)


# ---- LLaVA's names


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face LLaVA with the legacy names, of a real XTuner training."""
    xtuner = GOLDEN / "xtuner"
    sources = {
        "trained": xtuner / "single_trainvit" / "iter_2.pth",
        "llm": xtuner / "base_llm",
        "vision": xtuner / "base_clip",
    }
    return use_preset("xtuner/llava-to-hf", sources, tmp_path_factory.mktemp("llava") / "out")


def test_llava_through_the_names_of_all_versions(llava: Path, tmp_path: Path) -> None:
    """Any order of versions: each reads the names of all others."""
    last = llava
    for step, names in enumerate(("4.52", "5.6", "4.52", "4.51", "5.6", "4.51")):
        last = use_preset(f"hf/to-{names}", {"hf": last}, tmp_path / f"step{step}")
        found = read_tensors(last)
        assert len(found) == len(read_tensors(llava))
        assert ("lm_head.weight" in found) == (names != "4.51")
    compare_bits(read_tensors(last), read_tensors(llava))


@pytest.mark.parametrize(("case", "names"), [("llava_names_l2", "4.52"), ("llava_names_l3", "5.6")])
def test_transformers_own_names_are_made(case: str, names: str, tmp_path: Path) -> None:
    """The source is what ``state_dict()`` of a loaded model is called in those versions."""
    if case not in CASES:
        pytest.skip("the golden case is not here")
    found = read_tensors(use_preset(f"hf/to-{names}", {"hf": truth(case)}, tmp_path / "out"))
    compare_bits(found, read_tensors(LAYOUTS / case / "source"))


def test_llava_to_its_own_code_and_back(llava: Path, tmp_path: Path) -> None:
    official = use_preset("llava/hf-to-official", {"hf": llava}, tmp_path / "official")
    names = read_tensors(official)
    assert {"model.mm_projector.0.weight", "lm_head.weight"} <= set(names)
    sources = {"llava": official, "vision": GOLDEN / "xtuner" / "base_clip"}  # for the sizes; its weights are shadowed
    back = use_preset("llava/official-to-hf", sources, tmp_path / "back")
    compare_bits(read_tensors(back), read_tensors(llava))
