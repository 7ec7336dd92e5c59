"""Several adapters of one run, exported: the judge is what ``PeftModel.save_pretrained`` writes, bit by bit."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import shardmerge as sm
from tests.adapter_runs import IDS, WEIGHTS, gpt2, llama, opened, saved, shaken, trained

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
FAST = sm.Options(sync=False)
ROOT = "base_model.model."
XTUNER = Path(__file__).parent / "golden" / "xtuner"
Settings = dict[str, object]
PLAIN: Settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Settings]]] = {
    "plain": (llama, {"default": {}, "style": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}}),
    "no default": (llama, {"policy": {}, "reference": {"lora_alpha": 3, "use_rslora": True}}),
    "dora": (llama, {"default": {"use_dora": True}, "style": {}, "facts": {"use_dora": True}}),
    "embeddings": (llama, {"default": {}, "style": {"target_modules": ["embed_tokens", "q_proj"]}}),
    "heads": (llama, {"default": {"modules_to_save": ["lm_head"]}, "style": {"modules_to_save": ["lm_head"]}}),
    "tokens": (llama, {name: {"trainable_token_indices": [1, 5]} for name in ("default", "style")}),
    "lora bias": (llama, {"default": {"lora_bias": True}, "style": {"lora_bias": True}}),
    "conv1d": (gpt2, {name: {"target_modules": ["c_attn"], "fan_in_fan_out": True} for name in ("default", "style")}),
    "alone": (llama, {"style": {}}),
}


def run_of(folder: Path, kind: str) -> PeftModel:
    """A run of several adapters: what peft saves of it as ``saved``; its whole state, with the configs, as ``run``."""
    make, adapters = KINDS[kind]
    base = make()
    saved(base, folder / "base")
    base = opened(base, folder / "base")
    first, *others = adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**PLAIN | adapters[first]), adapter_name=first)
        for name in others:
            model.add_adapter(name, LoraConfig(**PLAIN | adapters[name]))
        for number, name in enumerate(adapters):
            model.set_adapter(name)
            shaken(model, number)
        model.save_pretrained(folder / "saved", save_embedding_layers=False)
    (folder / "run").mkdir()
    torch.save(model.state_dict(), folder / "run" / "pytorch_model.bin")
    for path in folder.glob("saved/**/adapter_config.json"):
        place = folder / "run" / path.relative_to(folder / "saved")
        place.parent.mkdir(exist_ok=True)
        shutil.copy(path, place)
    return model


def assert_saved(found: Path, truth: Path) -> None:
    """The same tensors, and a config that says the same."""
    ours, theirs = load_file(found / WEIGHTS), load_file(truth / WEIGHTS)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name
    said, wanted = (json.loads((one / "adapter_config.json").read_text()) for one in (found, truth))
    assert {key: said[key] for key in wanted} == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_are_saved_as_peft_saves_them(tmp_path: Path, kind: str) -> None:
    model = run_of(tmp_path, kind)
    sm.convert(tmp_path / "run", tmp_path / "out", use="peft/export", options=FAST)
    truth = tmp_path / "saved" / ("style" if kind == "alone" else ".")
    names = {path.relative_to(truth) for path in truth.glob(f"**/{WEIGHTS}")}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob(f"**/{WEIGHTS}")} == names
    for name in names:
        assert_saved(tmp_path / "out" / name.parent, truth / name.parent)
        adapter = "style" if kind == "alone" else str(name.parent).replace(".", "default")
        again = PeftModel.from_pretrained(
            opened(KINDS[kind][0](), tmp_path / "base"), tmp_path / "out" / name.parent, adapter_name=adapter
        )
        model.set_adapter(adapter)
        with torch.no_grad():
            assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


def as_dcp(run: Path) -> None:
    state = torch.load(run / "pytorch_model.bin")
    (run / "pytorch_model.bin").unlink()
    dcp.save({"model": state}, checkpoint_id=run, no_dist=True)


def wrapped(run: Path) -> None:
    state = torch.load(run / "pytorch_model.bin")
    torch.save({f"module.{name}": one for name, one in state.items()}, run / "pytorch_model.bin")


def changed(run: Path, name: Callable[[str], str], keep: str = "") -> None:
    state = torch.load(run / "pytorch_model.bin")
    torch.save({name(key): one for key, one in state.items() if keep in key}, run / "pytorch_model.bin")


def inner(run: Path) -> None:
    """The state of the model inside of peft's, base and all."""
    changed(run, lambda key: key.removeprefix(ROOT))


def inner_alone(run: Path) -> None:
    """Its adapters alone, as ranks wrapped by DistributedDataParallel save them."""
    changed(run, lambda key: f"module.{key.removeprefix(ROOT)}", ".lora_")


@pytest.mark.parametrize("change", [as_dcp, wrapped, inner, inner_alone])
def test_in_every_format(tmp_path: Path, change: Callable[[Path], None]) -> None:
    run_of(tmp_path, "plain")
    change(tmp_path / "run")
    sm.convert(tmp_path / "run", tmp_path / "out", use="peft/export", options=FAST)
    for folder in (".", "style"):
        assert_saved(tmp_path / "out" / folder, tmp_path / "saved" / folder)


def test_saved_names_without_peft_s_prefix(tmp_path: Path) -> None:
    run_of(tmp_path, "alone")
    shutil.copy(tmp_path / "run/style/adapter_config.json", tmp_path / "run")
    changed(tmp_path / "run", lambda key: key.removeprefix(ROOT).replace(".style", ""), ".lora_")
    sm.convert(tmp_path / "run", tmp_path / "out", use="peft/export", options=FAST)
    assert_saved(tmp_path / "out", tmp_path / "saved" / "style")


def test_what_another_library_calls_so_is_not_taken_for_peft_s(tmp_path: Path) -> None:
    """A pipeline's parts; the names of mlx-lm; a model without any adapter."""
    for names in ("unet.a.lora_A.weight unet.a.lora_B.weight", "a.b.lora_a a.b.lora_b", "a.weight b.weight"):
        torch.save({name: torch.ones(2, 2) for name in names.split()}, tmp_path / "run.pt")
        with pytest.raises(sm.ShardmergeError, match="another-layout"):
            sm.convert(tmp_path / "run.pt", tmp_path / "out", use="peft/export", options=FAST)


@pytest.mark.parametrize(("part", "alpha"), [("llm", 8), ("visual_encoder", 1)])
def test_the_training_config_says_alpha(tmp_path: Path, part: str, alpha: int) -> None:
    """XTuner's, in the checkpoint itself: `llm_lora` and `visual_encoder_lora`."""
    trained = XTUNER / "lora_both" / "iter_2.pth"
    other = "llm" if part == "visual_encoder" else "visual_encoder"
    pair = f"{ROOT}{{m...}}.{{k:lora_A|lora_B}}"
    (tmp_path / "m.yaml").write_text(
        f"shardmerge: 1\nsources: {{trained: {trained}}}\noutput: out\n"
        f"target: {{name: peft/adapter, trained: trained, under: {part}}}\n"
        f'tensors: {{"{pair}.weight": "trained:{part}.{pair}.default.weight"}}\n'
        f'drop: ["trained:projector.{{rest...}}", "trained:{other}.{{rest...}}"]\n'
    )
    sm.run(tmp_path / "m.yaml", options=FAST)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    config = (trained.parent / "config.py").read_text()
    assert re.search(rf"{part}_lora=dict\([^)]*lora_alpha={alpha},", config)
    assert said["lora_alpha"] == alpha


def exported(folder: Path, options: str) -> Path:
    (folder / "m.yaml").write_text(
        "shardmerge: 1\nsources: {trained: run}\noutput: out\nuse: peft/export\n"
        f"target: {{name: peft/adapter, trained: trained{options}}}\n"
    )
    sm.run(folder / "m.yaml", options=FAST)
    return folder / "out"


@pytest.mark.parametrize(("kind", "name"), [("plain", "default"), ("plain", "style"), ("no default", "reference")])
def test_one_of_several_stands_at_the_top(tmp_path: Path, kind: str, name: str) -> None:
    run_of(tmp_path, kind)
    out = exported(tmp_path, f", adapter: {name}")
    assert_saved(out, tmp_path / "saved" / ("." if name == "default" else name))
    assert [path.parent for path in out.glob(f"**/{WEIGHTS}")] == [out]


def refusal(folder: Path, options: str = "") -> str:
    with pytest.raises(sm.ShardmergeError) as caught:
        exported(folder, options)
    assert not (folder / "out").exists()
    return " ".join(str(caught.value).split())


def test_the_config_of_one_adapter_is_not_that_of_another(tmp_path: Path) -> None:
    """``adapter_config.json`` at the top is the default's: its alpha would scale the other adapter wrongly."""
    run_of(tmp_path, "plain")
    shutil.rmtree(tmp_path / "run" / "style")
    said = refusal(tmp_path)
    assert "[adapter-alpha]" in said
    assert "style/adapter_config.json" in said
    assert "adapter: style, alpha: 16" in said
    (tmp_path / "run" / "adapter_config.json").unlink()
    out = exported(tmp_path, ", adapter: style, alpha: 6")
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 6


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    run_of(tmp_path, "plain")
    said = refusal(tmp_path, ", adapter: styel")
    assert "[unknown-adapter]" in said
    assert "default, style" in said


# --- several made one


def two(folder: Path, first: Settings, second: Settings, make: Callable[[], nn.Module] = llama) -> nn.Module:
    base = make()
    saved(base, folder / "base")
    trained(opened(base, folder / "base"), folder / "one", seed=1, **first)
    trained(opened(base, folder / "base"), folder / "two", seed=2, **second)
    return base


def weighted(base: nn.Module, folder: Path, weights: tuple[float, float], way: str) -> tuple[Path, PeftModel]:
    """What peft makes of the two, and saves."""
    model = PeftModel.from_pretrained(opened(base, folder / "base"), folder / "one", adapter_name="one")
    model.load_adapter(folder / "two", adapter_name="two")
    model.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type=way)
    model.save_pretrained(folder / "truth", selected_adapters=["both"], save_embedding_layers=False)
    model.set_adapter("both")
    return folder / "truth" / "both", model.eval()


def combined(folder: Path, weights: tuple[float, float], way: str) -> Path:
    lines = (
        f"{{from: {name}, onto: trained, weight: {weight}, combination_type: {way}}}"
        for name, weight in zip(("trained", "two"), weights, strict=True)
    )
    return written(folder, f"adapters: [{', '.join(lines)}]")


def written(folder: Path, adapters: str) -> Path:
    (folder / "m.yaml").write_text(
        f"shardmerge: 1\nsources: {{trained: one, two: two}}\noutput: out\nuse: peft/export\n{adapters}\n"
    )
    sm.run(folder / "m.yaml", options=FAST)
    return folder / "out"


PAIRS: dict[str, tuple[Callable[[], nn.Module], Settings, Settings]] = {
    "same modules": (llama, {}, {"lora_alpha": 4}),
    "other modules": (llama, {"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "other alphas": (llama, {"lora_alpha": 3}, {"lora_alpha": 16, "alpha_pattern": {"q_proj": 2}}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"]}),
    "conv1d": (gpt2, *[{"target_modules": ["c_attn"], "fan_in_fan_out": True}] * 2),
    "ranks": (llama, {}, {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}),
    "rank pattern": (llama, {"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}}),
}
# peft 0.21 drops the pattern of what it makes so, and cannot load it again. Here the pattern stays, its scale is on A.
SCALED_APART = ("rank pattern", "linear")
COMBINED = [(kind, way) for kind in PAIRS for way in ("cat", "linear") if (kind, way) != ("ranks", "linear")]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.0, -0.5), (-1.0, -2.0)])
@pytest.mark.parametrize(("kind", "way"), COMBINED)
def test_two_adapters_become_one_as_in_peft(tmp_path: Path, kind: str, way: str, weights: tuple[float, float]) -> None:
    make, first, second = PAIRS[kind]
    base = two(tmp_path, first, second, make)
    truth, live = weighted(base, tmp_path, weights, way)
    out = combined(tmp_path, weights, way)
    ours, theirs = load_file(out / WEIGHTS), load_file(truth / WEIGHTS)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        exact = way == "cat" and set(weights) == {1.0}
        close = (ours[name] - tensor).abs().max() < 1e-6 or (kind, way) == SCALED_APART
        assert torch.equal(ours[name], tensor) if exact else close, name
    model = PeftModel.from_pretrained(opened(base, tmp_path / "base"), out).eval()
    with torch.no_grad():
        assert (model(IDS).logits - live(IDS).logits).abs().max() < 1e-5


def test_an_adapter_that_is_named_as_onto_alone_counts_once(tmp_path: Path) -> None:
    base = two(tmp_path, {}, {})
    truth, _ = weighted(base, tmp_path, (1.0, 1.0), "cat")
    out = written(tmp_path, "adapters: [{from: two, onto: trained}]")
    assert {name: one.tolist() for name, one in load_file(out / WEIGHTS).items()} == {
        name: one.tolist() for name, one in load_file(truth / WEIGHTS).items()
    }


def test_rslora_is_catenated_at_its_own_scale(tmp_path: Path) -> None:
    """peft's own combination keeps ``use_rslora`` and counts the root of the rank twice; both active are right."""
    base = two(tmp_path, {"use_rslora": True}, {"use_rslora": True, "r": 2})
    out = combined(tmp_path, (1.0, 1.0), "cat")
    model = PeftModel.from_pretrained(opened(base, tmp_path / "base"), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    again = PeftModel.from_pretrained(opened(base, tmp_path / "base"), out).eval()
    with torch.no_grad():
        assert (model.eval()(IDS).logits - again(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("second", "way", "words"),
    [
        ({"r": 2}, "linear", "linear adds A to A"),
        ({"use_rslora": True}, "linear", "rsLoRA"),
        ({"use_dora": True}, "cat", "magnitude"),
        ({"modules_to_save": ["lm_head"]}, "cat", "trained whole"),
        ({}, "svd", "rounds the sum to a rank"),
        ({}, "ties", "prunes A and B apart"),
    ],
)
def test_what_is_no_one_adapter_is_refused_by_name(tmp_path: Path, second: Settings, way: str, words: str) -> None:
    two(tmp_path, {}, second)
    with pytest.raises(sm.ShardmergeError) as caught:
        combined(tmp_path, (1.0, 1.0), way)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["cat", "linear"])
def test_half_a_pair_is_not_combined(tmp_path: Path, way: str) -> None:
    two(tmp_path, {}, {})
    whole = load_file(tmp_path / "two" / WEIGHTS)
    half = {name: one for name, one in whole.items() if "0.self_attn.q_proj.lora_B" not in name}
    save_file(half, tmp_path / "two" / WEIGHTS)
    with pytest.raises(sm.ShardmergeError, match="adapter-incomplete"):
        combined(tmp_path, (1.0, 1.0), way)


def test_two_ways_at_once_are_an_error(tmp_path: Path) -> None:
    two(tmp_path, {}, {})
    with pytest.raises(sm.ShardmergeError, match="these lines have two"):
        written(
            tmp_path, "adapters: [{from: trained, onto: trained, combination_type: linear}, {from: two, onto: trained}]"
        )
