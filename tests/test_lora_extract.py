"""The way back of a LoRA: two models to the adapter between them, as near as its rank allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import shardmerge as sm
from shardmerge import api
from shardmerge.ops.contract import State, Stream
from shardmerge.ops.extract import LoraExtract
from tests.adapter_runs import IDS, WEIGHTS, llama, merged_state, opened, saved, trained
from tests.conftest import read_all
from tests.op_harness import execute

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

GOLDEN = Path(__file__).parent / "golden" / "adapters"


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (3000, 8), (8, 3000)])
@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_product_of_the_rank_is_nearer(shape: tuple[int, int], rank: int, dtype: type) -> None:
    """The distance is that of an SVD; the harness compares the memory with what is promised."""
    rng = np.random.default_rng(0)
    base, tuned = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    a, b = (execute(LoraExtract(rank, take), [base, tuned]).array.astype(np.float64) for take in "AB")
    delta = tuned.astype(np.float64) - base
    optimum = np.sqrt((np.linalg.svd(delta, compute_uv=False)[rank:] ** 2).sum())
    assert np.linalg.norm(delta - b @ a) <= optimum * (1 + 1e-9) + 1e-7 * np.linalg.norm(delta)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-5)


@pytest.mark.parametrize("take", ["A", "B"])
def test_nothing_changed_is_nothing(take: str) -> None:
    same = np.random.default_rng(0).standard_normal((12, 10)).astype(np.float32)
    assert not execute(LoraExtract(3, take), [same, same]).array.any()


@pytest.mark.parametrize("shape", [(64, 24), (24, 64)])
def test_a_difference_of_a_low_rank_comes_back(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape).astype(np.float32)
    delta = rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
    tuned = (base + delta).astype(np.float32)
    a, b = (execute(LoraExtract(6, take), [base, tuned]).array.astype(np.float64) for take in "AB")
    np.testing.assert_allclose(b @ a, delta, atol=2e-6)


def extract(folder: Path, *words: str, base: Path | None = None, tuned: Path | None = None) -> Path:
    """The adapter of ``base`` and ``tuned`` in a folder, by the preset."""
    path = mapping_of(folder, base or folder / "base", tuned or folder / "tuned", *words)
    sm.run(path, options=sm.Options(sync=False))
    return folder / "adapter"


def mapping_of(folder: Path, base: Path, tuned: Path, *words: str) -> Path:
    head = "shardmerge: 1\noutput: adapter\nuse: peft/extract\n"
    path = folder / "extract.yaml"
    path.write_text(head + f"sources: {{base: {base}, tuned: {tuned}}}\n" + "\n".join(words), "utf-8")
    return path


def moved(model: nn.Module, scale: float = 0.01) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def nearest(delta: torch.Tensor, rank: int) -> torch.Tensor:
    left, lengths, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return (left[:, :rank] * lengths[:rank]) @ right[:rank]


BASES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("rank", [2, 8])
def test_peft_loads_what_is_nearest(tmp_path: Path, case: str, rank: int) -> None:
    """Every matrix is the base's plus the best product; norms and biases are the tuned model's."""
    base = llama(**BASES[case])
    saved(base, tmp_path / "base")
    tuned = moved(opened(base, tmp_path / "base"))
    saved(tuned, tmp_path / "tuned")
    adapter = extract(tmp_path, f"let: {{rank: {rank}}}")
    loaded = PeftModel.from_pretrained(opened(base, tmp_path / "base"), adapter)
    assert loaded.peft_config["default"].r == rank
    found, before, after = merged_state(loaded), base.state_dict(), tuned.state_dict()
    for name, one in found.items():
        if case == "tied" and name == "lm_head.weight":
            continue  # peft's live head stays as it was
        delta = (after[name] - before[name]).double()
        near = nearest(delta, rank) if delta.ndim == 2 else delta
        assert (one.double() - before[name].double() - near).abs().max() < 2e-6, name


def test_all_of_the_rank_is_the_tuned_model(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    tuned = moved(opened(base, tmp_path / "base"))
    saved(tuned, tmp_path / "tuned")
    adapter = extract(tmp_path, "let: {rank: 8}")
    with torch.no_grad():
        truth, untouched = tuned(IDS).logits, base(IDS).logits
        answer = PeftModel.from_pretrained(opened(base, tmp_path / "base"), adapter).eval()(IDS).logits
    assert (answer - truth).abs().max() < 0.7 * (untouched - truth).abs().max()


def test_a_merged_adapter_comes_back_whole(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"])
    saved(model.merge_and_unload(), tmp_path / "tuned")
    adapter = extract(tmp_path, "let: {rank: 4}")
    found = merged_state(PeftModel.from_pretrained(opened(base, tmp_path / "base"), adapter))
    for name, one in load_file(tmp_path / "tuned" / "model.safetensors").items():
        assert (found[name] - one).abs().max() < 2e-6, name


def test_as_near_as_mergekit(tmp_path: Path) -> None:
    """The product of each matrix is that of mergekit-extract-lora 0.1.5; embeddings it saves whole."""
    folder = GOLDEN / "mergekit_extract"
    ours = load_file(
        extract(tmp_path, "let: {rank: 4}", base=GOLDEN / "bases" / "llama", tuned=folder / "tuned") / WEIGHTS
    )
    theirs = load_file(folder / "adapter" / WEIGHTS)
    before, after = (load_file(one / "model.safetensors") for one in (GOLDEN / "bases" / "llama", folder / "tuned"))
    pairs = [name.removesuffix("lora_A.weight") for name in theirs if name.endswith("lora_A.weight")]
    assert len(pairs) == 14
    for stem in pairs:
        name = stem.removeprefix("base_model.model.") + "weight"
        delta = (after[name] - before[name]).double()
        distances = [
            (delta - one[stem + "lora_B.weight"].double() @ one[stem + "lora_A.weight"].double()).norm()
            for one in (ours, theirs)
        ]
        optimum = (delta - nearest(delta, 4)).norm()
        assert distances[0] <= optimum + 1e-7
        assert distances[0] <= distances[1] + 1e-7


def test_the_same_inputs_make_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        places = {"base": GOLDEN / "bases" / "llama", "tuned": GOLDEN / "mergekit_extract" / "tuned"}
        found.append((extract(tmp_path / name, "let: {rank: 4}", **places) / WEIGHTS).read_bytes())
    assert found[0] == found[1]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was searched for directions, one line a search."""
    found: list[str] = []
    prepare = LoraExtract.prepare

    def counted(op: LoraExtract, inputs: Sequence[Stream]) -> State:
        found.append(f"{inputs[0].meta.shape}")
        return prepare(op, inputs)

    monkeypatch.setattr(LoraExtract, "prepare", counted)
    return found


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_pair_of_factors_is_searched_for_once(tmp_path: Path, searches: list[str], workers: int) -> None:
    """Whatever the threads, from a plan in a file as well, and by `verify --sources`, which makes all of it again."""
    path = mapping_of(tmp_path, GOLDEN / "bases" / "llama", GOLDEN / "mergekit_extract" / "tuned", "let: {rank: 4}")
    api.write_plan(api.prepare_mapping(path, sm.Options()), tmp_path / "plan.json", tmp_path / "adapter")
    sm.run(tmp_path / "plan.json", options=sm.Options(sync=False, workers=workers))
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    pairs = sum("lora_A" in name or "lora_embedding_A" in name for name in weights)
    assert len(searches) == pairs > 14
    sm.verify(tmp_path / "adapter", sources=path)
    assert len(searches) == 2 * pairs


def test_factors_in_files_apart_are_those_of_one_file(tmp_path: Path, searches: list[str]) -> None:
    """Each file is a part that another process may make: the search is made for each, and gives the same."""
    rng = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        save_file({"q.weight": torch.randn(200, 120, generator=rng)}, tmp_path / f"{name}.safetensors")
    rules = [
        f'{take}: {{op: lora_extract, base: "base:q.weight", of: "tuned:q.weight", rank: 3, take: {take}}}'
        for take in "AB"
    ]
    found = []
    for size in ("3KB", "1GB"):
        text = "shardmerge: 1\nsources: {base: base.safetensors, tuned: tuned.safetensors}\n"
        text += f"output: {{path: out{size}, shard_size: {size}}}\ntensors: {{{', '.join(rules)}}}\n"
        (tmp_path / "m.yaml").write_text(text, "utf-8")
        sm.run(tmp_path / "m.yaml", options=sm.Options(sync=False))
        files = sorted((tmp_path / f"out{size}").glob("*.safetensors"))
        found.append((len(files), {name: one.tolist() for file in files for name, one in load_file(file).items()}))
    assert [count for count, _ in found] == [2, 1]
    assert found[0][1] == found[1][1]
    assert len(searches) == 3


def test_states_of_one_tensor_stay_apart(tmp_path: Path, searches: list[str]) -> None:
    rng = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        save_file({key: torch.randn(20, 12, generator=rng) for key in ("k", "q")}, tmp_path / f"{name}.safetensors")
    q, k = (f'{{op: lora_extract, base: "base:{key}", of: "tuned:{key}", rank: 3, take: A}}' for key in "qk")
    low, high = (f'{{op: ties, base: "base:q", of: ["tuned:q"], density: {density}}}' for density in (0.2, 0.8))
    rules = f"q: {q}, k: {k}, both: {{op: linear, of: [{q}, {k}], weights: [1, 1]}}, low: {low}, high: {high}"
    rules += f", sum: {{op: linear, of: [{low}, {high}], weights: [1, 1]}}"
    text = "shardmerge: 1\nsources: {base: base.safetensors, tuned: tuned.safetensors}\noutput: out\n"
    (tmp_path / "m.yaml").write_text(f"{text}tensors: {{{rules}}}\n", "utf-8")
    sm.run(tmp_path / "m.yaml", options=sm.Options(sync=False))
    found = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert torch.equal(found["both"], found["q"] + found["k"])
    assert torch.equal(found["sum"], found["low"] + found["high"])
    assert not torch.equal(found["q"], found["k"])
    assert not torch.equal(found["low"], found["high"])
    assert len(searches) == 4


def refused(folder: Path, *words: str, **places: Path) -> str:
    with pytest.raises(sm.ShardmergeError) as caught:
        extract(folder, *words, **places)
    return " ".join(str(caught.value).split())


def test_another_model_is_no_base(tmp_path: Path) -> None:
    saved(llama(hidden_size=32), tmp_path / "base")
    saved(llama(), tmp_path / "tuned")
    assert "[not-one-model]" in refused(tmp_path)


def test_stacks_are_not_extracted(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        saved(llama(), tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        save_file(load_file(path) | {"model.layers.0.experts.down_proj": torch.zeros(2, 4, 4)}, path)
    assert "neither matrices nor vectors" in refused(tmp_path)


def test_a_rank_that_a_weight_does_not_have(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "base")
    saved(llama(), tmp_path / "tuned")
    said = refused(tmp_path, "let: {rank: 9}")
    assert "[op-shape]" in said
    assert "--let rank=8" in said


def test_what_the_run_left_alone_may_be_dropped(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "base")
    saved(moved(llama()), tmp_path / "tuned")
    norms = [f"{{m...}}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "norm")]
    drop = ", ".join(f"'{source}:{name}'" for source in ("tuned", "base") for name in norms)
    adapter = extract(tmp_path, f"drop: [{drop}]", "let: {rank: 4}")
    names = list(read_all(sm.inspect(adapter)))
    assert not [name for name in names if "norm" in name]


def test_memory_is_refused_with_the_number(tmp_path: Path) -> None:
    """1,024 square takes more than the 16 MiB that are given."""
    saved(llama(hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1), tmp_path / "base")
    saved(
        llama(hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1), tmp_path / "tuned"
    )
    path = tmp_path / "extract.yaml"
    path.write_text("shardmerge: 1\noutput: adapter\nuse: peft/extract\nsources: {base: base, tuned: tuned}\n", "utf-8")
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.run(path, options=sm.Options(sync=False, memory=48 << 20))
    assert caught.value.exit_code == 4
