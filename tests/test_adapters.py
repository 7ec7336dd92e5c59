"""Adapters merged into their bases, against peft's own ``merge_and_unload`` of the same adapter.

float32: ours is the true sum rounded once, peft's is summed in float32. With u = 2**-24, a float32 sum of r products is
within ``r * u * sum|b||a|`` of the true one in any order; the product with the scale rounds once more, and so does the
addition, on both sides.

bfloat16: ours is the float32 sum rounded once, peft's is rounded twice more: it casts the delta to the adapter's type,
and adds it to the weight in bfloat16.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

import shardmerge as sm
from tests.conftest import GOLDEN, read_all, shardmerge

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

State = dict[str, torch.Tensor]
U32, U16 = 2.0**-24, 2.0**-8  # half the distance from 1 to the next number


def llama(*, tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
        )
    )  # fmt: skip


def clip() -> nn.Module:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=12, n_layer=2, n_head=2))


class Mixed(nn.Module):
    """A module of every kind that peft's LoRA knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 5, kernel_size=(3, 2))
        self.point = nn.Conv2d(5, 4, kernel_size=1)
        self.line = nn.Conv1d(4, 7, kernel_size=3)
        self.linear = nn.Linear(7, 9)
        self.grouped = nn.Conv2d(4, 8, kernel_size=3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A base, and what peft is asked to put on it."""

    base: Callable[[], nn.Module]
    config: Mapping[str, object]
    warn: tuple[str, ...] = field(default_factory=tuple)


def lora(base: Callable[[], nn.Module], *targets: str, **settings: object) -> Case:
    return Case(base, {"r": 4, "lora_alpha": 12, "target_modules": list(targets), **settings})


CASES = {
    "linear": lora(llama, *ALL),
    "tied": lora(lambda: llama(tied=True), *ALL),
    "clip": lora(clip, "q_proj", "v_proj", "fc1", "fc2"),
    "rslora": lora(llama, *ALL, use_rslora=True),
    "dora": lora(llama, *ALL, use_dora=True),
    "dora and rslora": lora(llama, *ALL, use_dora=True, use_rslora=True),
    "embedding": lora(llama, "embed_tokens", "q_proj"),
    "dora on an embedding": lora(llama, "embed_tokens", "q_proj", use_dora=True),
    "modules to save": lora(llama, "q_proj", modules_to_save=["lm_head", "embed_tokens"]),
    "lora bias": lora(llama, "q_proj", "v_proj", lora_bias=True),
    "bias all": lora(llama, "q_proj", bias="all"),
    "bias lora_only": lora(llama, "q_proj", "k_proj", bias="lora_only"),
    "patterns": lora(
        llama, *ALL,
        rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 8, "model.layers.1.self_attn.q_proj": 6},
        alpha_pattern={"q_proj": 3, "mlp.up_proj": 7},
    ),
    "patterns and rslora": lora(llama, *ALL, rank_pattern={"o_proj": 9}, alpha_pattern={"o_proj": 5}, use_rslora=True),
    "fan in fan out": lora(gpt2, "c_attn", "c_proj", "c_fc", fan_in_fan_out=True),
    "fan in fan out, dora": lora(gpt2, "c_attn", "c_fc", fan_in_fan_out=True, use_dora=True),
    "fan in fan out and an embedding": lora(gpt2, "c_attn", "wte", fan_in_fan_out=True),
    "conv": lora(Mixed, "conv", "point", "line", "linear", "embed"),
    "conv, dora": lora(Mixed, "conv", "point", "line", "linear", use_dora=True),
}  # fmt: skip


def adapted(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> PeftModel:
    """The base with an adapter on it that changes something: peft starts with B = 0."""
    torch.manual_seed(seed)
    base = case.base().to(dtype)
    if base.__class__ is Mixed:
        base.config = {"model_type": "custom", "tie_word_embeddings": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**case.config), autocast_adapter_dtype=False)
    stir(model)
    return model


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def base_of(model: PeftModel) -> State:
    """The weights below the adapter, as the base's own directory has them."""
    found: State = {}
    for name, tensor in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if ".lora_" not in name and ".modules_to_save." not in name:
            found[plain] = tensor.detach().clone()
    return found


def untied(state: State, model: nn.Module) -> State:
    """A file has one copy of what is tied."""
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    return {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


def write_base(model: PeftModel, folder: Path) -> State:
    """Writes the base as it was before any training, and returns what it holds."""
    state = untied(base_of(model), model.get_base_model())
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return state


def truth_of(model: PeftModel) -> State:
    """What peft makes of it; the model is used up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    return untied({name: tensor.detach() for name, tensor in merged.state_dict().items()}, merged)


def save(model: PeftModel, folder: Path, how: str) -> Path:
    """Saves the adapter as peft does, or the whole model as a training framework does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "whole":
            model.save_pretrained(folder)
            state = model.state_dict()
            for path in folder.glob("adapter_model.*"):
                path.unlink()
            torch.save(state, folder / "whole.pth")
            return folder / "whole.pth"
        model.save_pretrained(folder, safe_serialization=how == "safetensors", save_embedding_layers=False)
    return folder


MAPPING = """\
shardmerge: 1
sources: {{base: {base}, adapter: {adapter}}}
adapters: [{adapters}]
tensors:
  "{{rest...}}": base:{{rest...}}
"""


def write_mapping(folder: Path, base: Path, adapter: Path, extra: str = "") -> Path:
    path = folder / "mapping.yaml"
    entry = "{from: adapter, onto: base" + extra + "}"
    path.write_text(MAPPING.format(base=base, adapter=adapter, adapters=entry), "utf-8")
    return path


def merge(folder: Path, base: Path, adapter: Path, extra: str = "") -> dict[str, np.ndarray]:
    out = folder / "out"
    sm.run(write_mapping(folder, base, adapter, extra), out, options=sm.Options(sync=False))
    return read_all(sm.inspect(out))


def said_by_hand(case: Case) -> str:
    """A state dict has no config beside it: the mapping says what it says, where one number says it."""
    words = {"lora_alpha": "alpha", "use_rslora": "rslora", "fan_in_fan_out": "fan_in_fan_out"}
    return "".join(f", {word}: {str(case.config[key]).lower()}" for key, word in words.items() if key in case.config)


def bounds(before: State, model: PeftModel) -> dict[str, torch.Tensor]:
    """For every adapted weight the most that two float32 sums of any order may differ; see above."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = before[f"{name}.weight"].double()
        embedding = "default" in module.lora_embedding_A
        a = module.lora_embedding_A["default"] if embedding else module.lora_A["default"].weight
        b = module.lora_embedding_B["default"] if embedding else module.lora_B["default"].weight
        size = b.double().abs().flatten(1) @ a.double().abs().flatten(1)
        turned = embedding or getattr(module, "fan_in_fan_out", False)
        size = (size.T if turned else size).reshape(-1) * module.scaling["default"]
        total = weight.abs() + size.reshape(weight.shape)
        bound = U32 * ((a.shape[0] + 1) * size.reshape(weight.shape) + 2 * total)
        if "default" in module.lora_magnitude_vector:
            bound = _grown(bound, total, weight, module, turned=turned)
        found[f"{name}.weight"] = bound
    return found


def _grown(
    bound: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, module: nn.Module, *, turned: bool
) -> torch.Tensor:
    """DoRA multiplies by magnitude / norm; a norm of n squares is off by fewer than n + 8 roundings, and its terms."""
    magnitude = module.lora_magnitude_vector["default"].weight.double()
    scale = module.scaling["default"]
    delta = module.get_delta_weight("default").double() if scale else 0
    merged = weight + delta
    rows = merged.T if turned and merged.ndim == 2 else merged
    norm = rows.flatten(1).norm(dim=1)
    factor = (magnitude.reshape(-1) / norm).abs()
    noise = (bound.T if turned and bound.ndim == 2 else bound).flatten(1)
    spread = (noise.norm(dim=1) / norm + U32 * (rows[0].numel() + 8))[:, None] * rows.flatten(1).abs()
    grown = 2 * factor[:, None] * (noise + spread)
    return (grown.T if turned and bound.ndim == 2 else grown).reshape(bound.shape)


def assert_close(found: Mapping[str, np.ndarray], truth: State, allowed: Mapping[str, torch.Tensor]) -> None:
    """Bit by bit, but for what was multiplied."""
    assert set(found) == set(truth)
    changed = 0
    for name, tensor in truth.items():
        ours = torch.from_numpy(np.asarray(found[name]).astype(np.float64))
        off = (ours - tensor.double()).abs()
        limit = allowed.get(name, torch.zeros(()))
        assert ours.shape == tensor.shape
        assert (off <= limit).all(), f"{name}: {off.max():.3g} of {limit.max():.3g}"
        changed += name in allowed
    assert changed == len(allowed)


# Patterns stand in the config alone, which a state dict has not; a .bin holds the tensors of the safetensors file.
FORMS = [
    (name, how)
    for name in CASES
    for how in ("safetensors", "bin", "whole")
    if not (how == "whole" and "patterns" in name)
    and not (how == "bin" and name not in ("linear", "dora", "embedding", "modules to save"))
]


@pytest.mark.parametrize(("name", "how"), FORMS)
def test_float32_is_what_peft_merges(name: str, how: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = adapted(case)
    before = write_base(model, tmp_path / "base")
    adapter = save(model, tmp_path / "adapter", how)
    limits = bounds(before, model)
    assert max(float(limit.detach().max()) for limit in limits.values()) < 2e-4, "a bound that says nothing"
    if "lora_bias" in case.config:
        limits |= {key.replace(".weight", ".bias"): torch.tensor(4 * U32) for key in limits}
    truth = truth_of(model)
    assert any(not torch.equal(truth[key], before[key]) for key in truth)
    found = merge(tmp_path, tmp_path / "base", adapter, said_by_hand(case) if how == "whole" else "")
    assert_close(found, truth, limits)


def test_the_key_of_older_dora(tmp_path: Path) -> None:
    """peft 0.11 kept the magnitude as a bare parameter: ``lora_magnitude_vector.default``."""
    case = CASES["dora"]
    model = adapted(case)
    before = write_base(model, tmp_path / "base")
    limits = bounds(before, model)
    state = {
        name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector.default"): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    assert any(name.endswith("lora_magnitude_vector.default") for name in state)
    torch.save(state, tmp_path / "old.pth")
    found = merge(tmp_path, tmp_path / "base", tmp_path / "old.pth", said_by_hand(case))
    assert_close(found, truth_of(model), limits)


# --- bfloat16 ---


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "rslora", "embedding", "fan in fan out", "conv"])
def test_a_bfloat16_base_is_rounded_once(name: str, adapter_dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(CASES[name], torch.bfloat16)
    before = write_base(model, tmp_path / "base")
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(adapter_dtype)
    adapter = save(model, tmp_path / "adapter", "safetensors")
    exact = {key: _exact(module, before[f"{key}.weight"]) for key, module in _layers(model)}
    truth = truth_of(model)
    found = merge(tmp_path, tmp_path / "base", adapter)
    for key, (total, delta) in exact.items():
        ours = torch.from_numpy(found[f"{key}.weight"].astype(np.float32))
        assert torch.equal(ours, total.float().bfloat16().float()), key
        # peft's own two more roundings: of the delta to the adapter's type, and of the weight it is added to.
        theirs = truth[f"{key}.weight"].double()
        noise = 2.0**-18 * (delta.abs() + total.abs())  # its product in float32
        allowed = U16 * (delta.abs() + ours.double().abs() + theirs.abs()) + noise
        assert ((ours.double() - theirs).abs() <= allowed).all(), key
    for key in truth.keys() - {f"{key}.weight" for key in exact}:
        assert np.array_equal(found[key].astype(np.float32), truth[key].float().numpy()), key


def _layers(model: PeftModel) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]


def _exact(module: nn.Module, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``W + scale * B @ A`` and what is added, in float64."""
    embedding = "default" in module.lora_embedding_A
    a = module.lora_embedding_A["default"] if embedding else module.lora_A["default"].weight
    b = module.lora_embedding_B["default"] if embedding else module.lora_B["default"].weight
    delta = b.detach().double().flatten(1) @ a.detach().double().flatten(1) * module.scaling["default"]
    turned = embedding or getattr(module, "fan_in_fan_out", False)
    delta = (delta.T if turned else delta).reshape(weight.shape)
    return weight.double() + delta, delta


# --- several adapters ---


def test_one_adapter_after_the_other(tmp_path: Path) -> None:
    first = adapted(CASES["linear"])
    before = write_base(first, tmp_path / "base")
    save(first, tmp_path / "one", "safetensors")
    limits = bounds(before, first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = first.merge_and_unload()
        second = get_peft_model(merged, LoraConfig(**CASES["rslora"].config))
    torch.manual_seed(1)
    stir(second)
    save(second, tmp_path / "two", "safetensors")
    more = bounds(untied(base_of(second), merged), second)
    path = tmp_path / "mapping.yaml"
    path.write_text(
        "shardmerge: 1\nsources: {base: base, one: one, two: two}\n"
        'adapters: [{from: one, onto: base}, {from: two, onto: base}]\ntensors: {"{rest...}": "base:{rest...}"}\n'
    )
    sm.run(path, tmp_path / "out", options=sm.Options(sync=False))
    found = read_all(sm.inspect(tmp_path / "out"))
    assert_close(found, truth_of(second), {name: limit + more[name] for name, limit in limits.items()})


def test_one_of_two_adapters_in_a_state_dict(tmp_path: Path) -> None:
    model = adapted(CASES["linear"])
    before = write_base(model, tmp_path / "base")
    model.add_adapter("other", LoraConfig(**CASES["linear"].config))
    limits = bounds(before, model)
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "both.pth")
    path = write_mapping(tmp_path, tmp_path / "base", tmp_path / "both.pth", ", alpha: 12")
    assert "[several-adapters]" in shardmerge("run", path, "--out", tmp_path / "out", code=1).stderr
    found = merge(tmp_path, tmp_path / "base", tmp_path / "both.pth", ", alpha: 12, name: default")
    assert_close(found, truth_of(model), limits)


# --- what trainers save ---


@pytest.mark.parametrize("name", ["lora_z2_w2_bf16", "lora_z3_w2_bf16"])
def test_a_zero_checkpoint_of_a_lora_run(name: str, tmp_path: Path) -> None:
    """DeepSpeed saved peft's model whole, in shards; the base is what was frozen in it."""
    case = GOLDEN / "zero" / name
    state = {key: tensor.float() for key, tensor in load_file(case / "truth.safetensors").items()}
    inner = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    plain = {key.replace(".base_layer.", "."): tensor for key, tensor in inner.items() if ".lora_" not in key}
    (tmp_path / "base").mkdir()
    save_file(plain, tmp_path / "base" / "model.safetensors")
    model = _llama_like(plain, inner)
    model.load_state_dict(state, strict=True)
    limits = bounds(plain, model)
    found = merge(tmp_path, tmp_path / "base", case / "ckpt", ", alpha: 16")
    assert_close(found, truth_of(model), limits)


def _llama_like(plain: State, inner: State) -> PeftModel:
    """peft's model of the sizes of a state dict."""
    rows, hidden = plain["model.embed_tokens.weight"].shape
    config = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, intermediate_size=len(plain["model.layers.0.mlp.up_proj.weight"]),
        num_hidden_layers=len({key.split(".")[2] for key in plain if ".layers." in key}),
        num_attention_heads=hidden // 2, head_dim=2,
        num_key_value_heads=len(plain["model.layers.0.self_attn.k_proj.weight"]) // 2,
    )  # fmt: skip
    ranks = {len(tensor) for key, tensor in inner.items() if ".lora_A." in key}
    targets = sorted({key.split(".lora_A.")[0] for key in inner if ".lora_A." in key})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            LlamaForCausalLM(config), LoraConfig(r=ranks.pop(), lora_alpha=16, target_modules=targets)
        )


XTUNER = GOLDEN / "xtuner"
ENTRIES = {
    "lora_llm": XTUNER / "lora_llm" / "work_dirs" / "iter_2.pth",
    "lora_both": XTUNER / "lora_both" / "iter_2.pth",
}


@pytest.mark.parametrize("name", ENTRIES)
def test_xtuner_runs_with_lora(name: str, tmp_path: Path) -> None:
    """alpha is in ``meta["cfg"]`` alone; the oracle is peft on the base models in memory, with alpha read by eye."""
    trained = load_file(XTUNER / name / "truth.safetensors")
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        f"shardmerge: 1\nsources: {{trained: {ENTRIES[name]}, llm: {XTUNER / 'base_llm'}, "
        f"vision: {XTUNER / 'base_clip'}}}\noutput: {{path: out, dtype: float32}}\nuse: xtuner/llava-to-hf\n"
    )
    sm.run(mapping, options=sm.Options(sync=False))
    found = read_all(sm.inspect(tmp_path / "out"))
    text = _on_base(LlamaForCausalLM.from_pretrained(XTUNER / "base_llm"), trained, "llm.", ALPHAS[name]["llm."])
    assert _compared(found, "language_model.", *text) == 14
    if "visual_encoder." in ALPHAS[name]:
        base = CLIPVisionModel.from_pretrained(XTUNER / "base_clip")
        vision = _on_base(base, trained, "visual_encoder.", ALPHAS[name]["visual_encoder."])
        assert _compared(found, "vision_tower.vision_model.", *vision) == 18
    _, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# lora_alpha of config.py beside them.
ALPHAS = {"lora_llm": {"llm.": 8}, "lora_both": {"llm.": 8, "visual_encoder.": 1}}


def _on_base(base: nn.Module, trained: State, prefix: str, alpha: int) -> tuple[State, dict[str, torch.Tensor]]:
    """peft's merge of what was trained into a base in memory, and the bounds for it."""
    own = {key.removeprefix(prefix): tensor.float() for key, tensor in trained.items() if key.startswith(prefix)}
    if prefix != "llm." and not any(name.startswith("vision_model.") for name, _ in base.named_modules()):
        own = {key.replace(".vision_model.", "."): tensor for key, tensor in own.items()}
    rank = next(len(tensor) for key, tensor in own.items() if ".lora_A." in key)
    targets = [key.split(".lora_A.")[0].removeprefix("base_model.model.") for key in own if ".lora_A." in key]
    model = get_peft_model(base.float(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    loaded = model.load_state_dict(own, strict=False)
    assert not loaded.unexpected_keys
    limits = bounds(base_of(model), model)
    return truth_of(model), limits


def _compared(found: Mapping[str, np.ndarray], prefix: str, truth: State, limits: Mapping[str, torch.Tensor]) -> int:
    """Compares all that was merged, and returns how much that was."""
    for name, limit in limits.items():
        ours = torch.from_numpy(found[prefix + name.removeprefix("vision_model.")]).double()
        assert ((ours - truth[name].double()).abs() <= limit).all(), name
    return len(limits)


# --- from the command line ---


def test_convert_merges_an_adapter_into_the_base_it_is_given(tmp_path: Path) -> None:
    """The result is a directory that transformers loads, with the base's config and the weights of peft's merge."""
    model = adapted(CASES["linear"], torch.float32)
    base = model.get_base_model()
    before = write_base(model, tmp_path / "base")
    base.config.save_pretrained(tmp_path / "base")
    save(model, tmp_path / "adapter", "safetensors")
    limits = bounds(before, model)
    done = shardmerge("convert", tmp_path / "adapter", tmp_path / "out", code=1)
    assert "[adapter-alone]" in done.stderr
    assert "--base base=MODEL" in done.stderr
    shardmerge("convert", tmp_path / "adapter", tmp_path / "out", "--base", f"base={tmp_path / 'base'}")
    truth = truth_of(model)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close({name: tensor.numpy() for name, tensor in loaded.state_dict().items()}, truth, limits)


def test_the_preset_refuses_what_is_no_adapter(tmp_path: Path) -> None:
    model = adapted(CASES["linear"])
    write_base(model, tmp_path / "base")
    model.get_base_model().config.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    base = ("--base", f"base={tmp_path / 'base'}")
    done = shardmerge("convert", tmp_path / "other", tmp_path / "out", "--use", "peft/merge", *base, code=1)
    assert "[" in done.stderr
    assert not (tmp_path / "out").exists()


# --- refusals ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter, to be spoilt."""
    folder = tmp_path_factory.mktemp("made")
    model = adapted(CASES["linear"])
    write_base(model, folder / "base")
    save(model, folder / "adapter", "safetensors")
    return folder


@pytest.fixture
def spoilt(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for name in ("base", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def refused(folder: Path, adapter: str = "adapter", extra: str = "") -> str:
    path = write_mapping(folder, folder / "base", folder / adapter, extra)
    done = shardmerge("run", path, "--out", folder / "out", code=1)
    assert not (folder / "out").exists()
    return done.stderr


def change_config(folder: Path, **settings: object) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_tensors(path: Path, change: Callable[[State], State]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def test_another_rank_than_the_config_says(spoilt: Path) -> None:
    change_config(spoilt, r=8)
    stderr = refused(spoilt)
    assert "[adapter-rank]" in stderr
    assert "A has 4 rows" in stderr
    assert "r = 8" in stderr


def test_no_alpha_anywhere(spoilt: Path) -> None:
    """The hint is a line to paste: with a number in it, it runs."""
    shutil.copy(spoilt / "adapter" / "adapter_model.safetensors", spoilt / "bare.safetensors")
    stderr = refused(spoilt, "bare.safetensors")
    assert stderr.count("[unknown-alpha]") == 1
    line = next(line for line in stderr.splitlines() if "alpha: NUMBER" in line).split("`")[1]
    path = write_mapping(spoilt, spoilt / "base", spoilt / "bare.safetensors")
    old = "adapters: [{from: adapter, onto: base}]"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, line.replace("NUMBER", "12")))
    sm.run(path, spoilt / "out", options=sm.Options(sync=False))
    by_config = merge(spoilt / "adapter", spoilt / "base", spoilt / "adapter")
    by_hand = read_all(sm.inspect(spoilt / "out"))
    assert all(by_hand[name].tobytes() == by_config[name].tobytes() for name in by_config)


def test_a_missing_b(spoilt: Path) -> None:
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    change_tensors(
        spoilt / "adapter" / "adapter_model.safetensors",
        lambda state: {name: tensor for name, tensor in state.items() if name != gone},
    )
    stderr = refused(spoilt)
    assert "[adapter-incomplete]" in stderr
    assert "model.layers.1.mlp.up_proj has no lora_B" in stderr


def test_a_base_of_another_size(spoilt: Path) -> None:
    change_tensors(
        spoilt / "base" / "model.safetensors",
        lambda state: {name: torch.cat([tensor, tensor]) for name, tensor in state.items()},
    )
    stderr = refused(spoilt)
    assert "[op-shape]" in stderr
    assert "name the base that the adapter was trained on" in stderr


def test_a_packed_base(spoilt: Path) -> None:
    """What bitsandbytes saves of a base in 4 bits."""

    def pack(state: State) -> State:
        found: State = {}
        for name, tensor in state.items():
            if "proj.weight" in name:
                found[name] = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
                found[f"{name}.absmax"] = torch.zeros(1)
                found[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)
            else:
                found[name] = tensor
        return found

    change_tensors(spoilt / "base" / "model.safetensors", pack)
    stderr = refused(spoilt)
    assert stderr.count("[packed-weights]") == 1
    assert "name the 16-bit model" in stderr


def test_no_adapter_at_all(spoilt: Path) -> None:
    stderr = refused(spoilt, "base")
    assert "[not-an-adapter]" in stderr
    assert "lora_A" in stderr


def test_ia3(spoilt: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        model.save_pretrained(spoilt / "ia3")
    stderr = refused(spoilt, "ia3")
    assert "[not-lora]" in stderr
    assert "merge_and_unload" in stderr


def test_a_convolution_with_groups(tmp_path: Path) -> None:
    model = adapted(lora(Mixed, "grouped"))
    write_base(model, tmp_path / "base")
    save(model, tmp_path / "adapter", "safetensors")
    assert "[op-shape]" in refused(tmp_path)


@pytest.mark.parametrize(
    ("said", "code"), [("alpha: high", "odd-setting"), ("alpha: -1", "odd-setting"), ("rslora: 1", "odd-setting")]
)
def test_settings_that_make_no_sense(spoilt: Path, said: str, code: str) -> None:
    assert f"[{code}]" in refused(spoilt, extra=f", {said}")
