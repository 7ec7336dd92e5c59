"""Fields of adapter_config.json that change the mathematics, each on a tiny model and against what peft loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import shardmerge as sm
from shardmerge.ops.residual import Residual
from tests.adapter_runs import (
    IDS,
    assert_same,
    change_config,
    gpt2,
    llama,
    merge,
    merged_state,
    opened,
    refusal,
    refused,
    saved,
    trained,
    write_mapping,
)
from tests.conftest import read_all
from tests.op_harness import execute

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def loaded(base: nn.Module, folder: Path) -> PeftModel:
    """What peft makes of a base and an adapter on disk."""
    return PeftModel.from_pretrained(opened(base, folder / "base"), folder / "lora").eval()


# --- initialisations that took something out of the base

STARTS = {
    "pissa": {},
    "pissa more rows": {"target_modules": ["gate_proj", "up_proj"]},
    "pissa more columns": {"target_modules": ["down_proj"]},
    "pissa rslora patterns": {"use_rslora": True, "rank_pattern": {r"1\..*q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "pissa dora": {"use_dora": True},
    "olora": {},
    "olora more rows": {"target_modules": ["gate_proj", "k_proj", "down_proj"], "lora_alpha": 4},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", STARTS)
def test_a_start_is_taken_out_of_the_base_as_peft_does_on_loading(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and "dora" in case:
        pytest.skip("peft's own DoRA rounds its factor, too: tests/test_adapters.py has the bound")
    base = llama().to(dtype)
    saved(base, tmp_path / "base")
    trained(
        opened(base, tmp_path / "base"), tmp_path / "lora", init_lora_weights=case.split(maxsplit=1)[0], **STARTS[case]
    )
    truth = merged_state(loaded(base, tmp_path))
    assert_same(merge(tmp_path), truth, 3e-6 if dtype == torch.float32 else 2**-8)


def test_pissa_of_a_conv1d(tmp_path: Path) -> None:
    base = gpt2()
    saved(base, tmp_path / "base")
    trained(
        opened(base, tmp_path / "base"),
        tmp_path / "lora",
        init_lora_weights="pissa",
        target_modules=["c_attn", "c_proj"],
    )
    assert_same(merge(tmp_path), merged_state(loaded(base, tmp_path)), 3e-6)


def test_a_start_is_that_of_an_untouched_base(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", init_lora_weights="pissa")
    assert "init_lora_weights pissa" in refused(tmp_path, said=", weight: 0.5")


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (150, 64)])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_residual_by_its_contract(shape: tuple[int, int], init: str, dtype: type) -> None:
    """Tiles give the bits of the whole, in the memory that is promised; the harness compares."""
    weight = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    found = execute(Residual(init, 4, 2.0), [weight])
    wide = weight.astype(np.float64)
    left, lengths, right = np.linalg.svd(wide)
    truth = wide - (left[:, :4] * lengths[:4]) @ right[:4]
    if init == "olora":
        q, r = np.linalg.qr(wide)
        truth = wide - 2.0 * q[:, :4] @ r[:4]
    np.testing.assert_allclose(found.array, truth, rtol=0, atol=1e-6)
    for tile in (1, 7 * shape[1], 64 * shape[1]):
        assert execute(Residual(init, 4, 2.0), [weight], tile).array.tobytes() == found.array.tobytes()


# --- more layers than the base has

REPLICATED = {
    "twice": [[0, 2], [0, 2]],
    "overlapping": [[0, 3], [1, 4]],
    "fewer": [[1, 3]],
}


@pytest.mark.parametrize("case", REPLICATED)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_replicated_layers_are_layers_of_the_result(tmp_path: Path, case: str, settings: dict[str, object]) -> None:
    base = llama(num_hidden_layers=4)
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), tmp_path / "lora", layer_replication=REPLICATED[case], **settings)
    with torch.no_grad():
        truth = model(IDS).logits
    merge(tmp_path)
    with torch.no_grad():
        answer = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert (answer - truth).abs().max() < 1e-5
    assert any("layer_replication" in text for text in sm.plan(tmp_path / "mapping.yaml").warnings)


def test_replication_beyond_the_base_is_refused(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora")
    change_config(tmp_path / "lora", layer_replication=[[0, 2], [1, 3]])
    assert "layer_replication does not fit the base" in refused(tmp_path)
    change_config(tmp_path / "lora", layer_replication=[[0, 2], [1]])
    assert "[odd-setting]" in refused(tmp_path)


def test_replication_comes_first(tmp_path: Path) -> None:
    """Another adapter numbers the base's own layers."""
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "plain")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", layer_replication=[[0, 2], [0, 2]])
    write_mapping(tmp_path, ["from: plain, onto: base", "from: lora, onto: base"], "base", ["plain", "lora"])
    assert "[adapters-clash]" in refusal(tmp_path)


# --- parameters that are no module's weight

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
MOE = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}


def mixtral(**settings: object) -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2} | settings))


def qwen3_moe(**settings: object) -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | MOE | {"mlp_only_layers": []} | settings))


def gpt_oss(**settings: object) -> nn.Module:
    sizes = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 2,
        "sliding_window": 8,
    }
    return GptOssForCausalLM(GptOssConfig(**SIZES | sizes | settings))


def deepseek(**settings: object) -> nn.Module:
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | MOE | sizes | ranks | settings))


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS = {
    "mixtral": (mixtral, BOTH, {}),
    "mixtral one": (mixtral, ["experts.down_proj"], {}),
    "mixtral square": (mixtral, BOTH, {"intermediate_size": 16}),
    "qwen3_moe": (qwen3_moe, BOTH, {}),
    "qwen3_moe router": (qwen3_moe, ["mlp.gate.weight"], {}),
    "qwen3_moe long names": (qwen3_moe, ["model.layers.1.mlp.experts.gate_up_proj"], {}),
    "deepseek_v3": (deepseek, BOTH, {}),
    "gpt_oss": (gpt_oss, BOTH, {}),
    "gpt_oss square": (gpt_oss, BOTH, {"intermediate_size": 16}),
}


@pytest.mark.parametrize("case", EXPERTS)
@pytest.mark.parametrize("attention", [True, False])
def test_parameters_are_adapted_expert_by_expert(tmp_path: Path, case: str, *, attention: bool) -> None:
    """The truth is peft's merge, as save_pretrained writes it: experts fused or apart as the base has them."""
    make, parameters, sizes = EXPERTS[case]
    torch.manual_seed(0)
    base = make(**sizes).eval()
    saved(base, tmp_path / "base")
    adapted: list[str] = ["o_proj"] if attention else []
    model = trained(
        opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=adapted, target_parameters=parameters
    )
    saved(model.merge_and_unload(), tmp_path / "truth")
    truth = {name: torch.from_numpy(one) for name, one in read_all(sm.inspect(tmp_path / "truth")).items()}
    untouched = read_all(sm.inspect(tmp_path / "base"))
    assert any((truth[name].numpy() != one).any() for name, one in untouched.items())
    assert_same(merge(tmp_path), truth)


def test_an_expert_that_has_no_tensors_is_missed(tmp_path: Path) -> None:
    base = mixtral().eval()
    saved(base, tmp_path / "base")
    trained(
        opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=[], target_parameters=["experts.down_proj"]
    )
    change_config(tmp_path / "lora", target_parameters=BOTH)
    assert "[adapter-incomplete]" in refused(tmp_path)


def test_square_experts_of_an_older_peft_are_not_guessed(tmp_path: Path) -> None:
    base = gpt_oss(intermediate_size=16).eval()
    saved(base, tmp_path / "base")
    trained(
        opened(base, tmp_path / "base"), tmp_path / "lora", target_modules=[], target_parameters=["experts.down_proj"]
    )
    change_config(tmp_path / "lora", peft_version="0.19.0")
    assert "[unknown-layer]" in refused(tmp_path)


@pytest.mark.parametrize("experts", [2, 3])
def test_experts_of_another_base_are_refused(tmp_path: Path, experts: int) -> None:
    base = mixtral().eval()
    saved(mixtral(num_local_experts=experts).eval(), tmp_path / "base")
    trained(base, tmp_path / "lora", target_modules=[], target_parameters=BOTH)
    said = refused(tmp_path)
    assert "[op-shape]" in said or "[adapter-rank]" in said


def test_parameters_that_no_base_has_are_refused(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "base")
    trained(mixtral().eval(), tmp_path / "lora", target_modules=[], target_parameters=BOTH)
    said = refused(tmp_path)
    assert "[adapter-without-base]" in said
    assert "target_parameters" in said


# --- how often an adapter counts


def weighed(base: nn.Module, folder: Path, weight: float) -> dict[str, torch.Tensor]:
    """What peft makes of an adapter whose scale was set."""
    model = loaded(base, folder)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", weight)
    return merged_state(model)


@pytest.mark.parametrize("weight", [0.5, -1.0, 2.5, 0.0])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {r".*\.1\..*v_proj": 2}}]
)
def test_a_weight_counts_over_alpha_and_its_patterns(
    tmp_path: Path, weight: float, settings: dict[str, object]
) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", **settings)
    assert_same(merge(tmp_path, said=f", weight: {weight}"), weighed(base, tmp_path, weight))


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}]
)
def test_what_is_there_or_not_has_no_weight(tmp_path: Path, settings: dict[str, object]) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", **settings)
    assert "`weight: 0.5` cannot be" in refused(tmp_path, said=", weight: 0.5")


@pytest.mark.parametrize("weight", ["much", "nan", "inf", "1e12"])
def test_a_weight_is_a_number(tmp_path: Path, weight: str) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora")
    assert "[odd-setting]" in refused(tmp_path, said=f", weight: {weight}")


# --- several at once


def two(folder: Path, first: dict[str, object], second: dict[str, object]) -> nn.Module:
    base = llama()
    saved(base, folder / "base")
    trained(opened(base, folder / "base"), folder / "one", seed=1, **first)
    trained(opened(base, folder / "base"), folder / "two", seed=2, **second)
    return base


def combined(base: nn.Module, folder: Path, weights: tuple[float, float], way: str) -> dict[str, torch.Tensor]:
    """What ``add_weighted_adapter`` makes of two adapters."""
    model = PeftModel.from_pretrained(opened(base, folder / "base"), folder / "one", adapter_name="one")
    model.load_adapter(folder / "two", adapter_name="two")
    model.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type=way)
    model.set_adapter("both")
    return merged_state(model)


def mixed(folder: Path, weights: tuple[float, float], way: str) -> None:
    lines = [
        f"from: {name}, onto: base, weight: {weight}, combination_type: {way}"
        for name, weight in zip(("one", "two"), weights, strict=True)
    ]
    write_mapping(folder, lines, "base", ["one", "two"])


SEVERAL = {
    "same modules": ({}, {}),
    "other modules": ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "other alphas": ({"lora_alpha": 3}, {"lora_alpha": 16, "alpha_pattern": {"q_proj": 2}}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"]}),
}


@pytest.mark.parametrize("case", SEVERAL)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
@pytest.mark.parametrize("way", ["linear", "cat"])
def test_several_are_combined_as_in_peft(tmp_path: Path, case: str, weights: tuple[float, float], way: str) -> None:
    base = two(tmp_path, *SEVERAL[case])
    mixed(tmp_path, weights, way)
    sm.run(tmp_path / "mapping.yaml", options=sm.Options(sync=False))
    assert_same(read_all(sm.inspect(tmp_path / "out")), combined(base, tmp_path, weights, way))


@pytest.mark.parametrize("way", ["svd", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune", "cats"])
def test_a_combination_that_is_no_merge_is_refused_with_the_reason(tmp_path: Path, way: str) -> None:
    two(tmp_path, {}, {})
    mixed(tmp_path, (1, 1), way)
    said = refusal(tmp_path)
    assert f"combination_type {way}" in said
    assert way == "cats" or ": it " in said


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"r": 2}, "[adapter-rank]"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"use_dora": True}, "magnitude"),
        ({"modules_to_save": ["lm_head"]}, "trained whole"),
    ],
)
def test_linear_is_of_pairs_alone(tmp_path: Path, second: dict[str, object], words: str) -> None:
    two(tmp_path, {}, second)
    mixed(tmp_path, (1, 1), "linear")
    assert words in refusal(tmp_path)


# --- expressions, as peft reads them

EXPRESSIONS = (
    {"rank_pattern": {r"layers\.[0]\.self_attn\.(q|k)_proj": 2}},
    {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 5, "q_proj": 3}},
    {"alpha_pattern": {r".*\.\d+\.self_attn\..*": 7}},
    {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qk]|mlp\.up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": r".*_proj", "exclude_modules": r".*layers\.0\..*|.*v_proj"},
)


@pytest.mark.parametrize("settings", EXPRESSIONS, ids=repr)
def test_expressions_fit_the_modules_that_they_fit_in_peft(tmp_path: Path, settings: dict[str, object]) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), tmp_path / "lora", **settings)
    assert_same(merge(tmp_path), merged_state(model))
