"""The golden layouts themselves: each truth is a whole model of transformers, and says what its source says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import GOLDEN

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYOUTS = GOLDEN / "layouts"
CASES = sorted(path.parent for path in LAYOUTS.glob("*/case.json"))
FIELDS = {
    "name", "tool", "versions", "function", "entry", "truth", "tensors_in_truth", "directions", "checks", "sizes",
    "notes",
}  # fmt: skip
LIMIT = 7_500_000


def named(start: str) -> list[Path]:
    return [case for case in CASES if case.name.startswith(start)]


def load(folder: Path):
    """The model of a folder in float32; fails unless every tensor found its place and no place stayed empty."""
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    model, told = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    found = {kind: sorted(told[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert found == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    return model.eval()


def pickled(path: Path):
    return torch.load(path, map_location="cpu", weights_only=True)


def test_the_folder_is_regular_and_small() -> None:
    assert len(CASES) >= 40
    assert {case.name for case in CASES} == {path.name for path in LAYOUTS.iterdir()}
    assert sum(path.stat().st_size for path in LAYOUTS.rglob("*") if path.is_file()) < LIMIT


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_says_what_it_is(case: Path) -> None:
    told = json.loads((case / "case.json").read_text())
    assert told.keys() - {"checks_made_with"} == FIELDS
    assert told["name"] == case.name
    assert (case / told["entry"]).exists()
    truth = load_file(case / told["truth"])
    assert len(truth) == told["tensors_in_truth"]
    assert told["checks"]
    shapes_and_bits = {
        (tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes()) for tensor in truth.values()
    }
    assert len(shapes_and_bits) == len(truth)  # no two are equal: a swap would be seen
    assert all(tensor.isfinite().all() for tensor in truth.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_loads_the_truth_whole(case: Path) -> None:
    load(case / "truth")


@pytest.mark.parametrize("case", named("phi3_to_llama"), ids=lambda case: case.name)
def test_phi3_and_llama_give_the_same_logits(case: Path) -> None:
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        fused, llama = (load(folder)(tokens).logits for folder in (case / "source", case / "truth"))
    torch.testing.assert_close(llama, fused, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", named("llava_names"), ids=lambda case: case.name)
def test_every_generation_of_names_is_the_same_model(case: Path) -> None:
    source, truth = load(case / "source").state_dict(), load(case / "truth").state_dict()
    assert source.keys() == truth.keys()
    assert all(torch.equal(source[name], tensor) for name, tensor in truth.items())


@pytest.mark.parametrize("case", named("meta_"), ids=lambda case: case.name)
def test_meta_shards_hold_every_number_of_the_truth(case: Path) -> None:
    """Shards, permuted or not, hold the numbers of the truth: as multisets, norms counted once a rank."""
    files = sorted((case / "source").glob("consolidated.*.pth"))
    shards = [pickled(file) for file in files]
    cut = [value for shard in shards for name, value in shard.items() if value.ndim > 1]
    whole = [value for value in load_file(case / "truth" / "model.safetensors").values() if value.ndim > 1]
    sorted_cut, sorted_whole = (torch.cat([part.flatten() for part in parts]).sort().values for parts in (cut, whole))
    assert torch.equal(sorted_cut, sorted_whole)


@pytest.mark.parametrize("name", ["torchtune_llama3_lora", "torchtune_llama3_dora"])
def test_the_merge_of_torchtune_changed_only_what_the_adapter_names(name: str) -> None:
    base = pickled(LAYOUTS / name / "source" / "base.pt")
    adapter = pickled(LAYOUTS / name / "source" / "epoch_0" / "adapter_model.pt")
    merged = load_file(LAYOUTS / name / "truth" / "model.safetensors")
    adapted = {key.split(".lora_")[0] for key in adapter if ".lora_" in key}
    same = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    for ours, theirs in same.items():
        key = f"{ours}.scale" if ours == "norm" else f"{ours}.weight"
        assert torch.equal(base[key], merged[f"{theirs}.weight"]) == (ours not in adapted)
    assert len(adapted) == (15 if name.endswith("lora") else 14)
    assert len(load_file(LAYOUTS / name / "truth" / "adapter" / "adapter_model.safetensors")) == len(adapter)
