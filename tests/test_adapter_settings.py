"""adapter_config.json by an allow-list: a field is honoured, of no weight in a merge, or refused by its name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftType

import shardmerge as sm
from shardmerge.targets import adapter_fields
from shardmerge.targets.adapter_config import read_adapter_config
from tests.adapter_runs import (
    assert_same,
    change_config,
    change_tensors,
    llama,
    merge,
    merged_state,
    opened,
    refused,
    saved,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = llama()
    saved(base, folder / "base")
    trained(opened(base, folder / "base"), folder / "lora")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_every_field_of_the_installed_peft_is_listed() -> None:
    """A new peft with a new field shows here first; until then its users get a refusal by name."""
    listed = {*adapter_fields.HONOURED, *adapter_fields.IRRELEVANT, *adapter_fields.REFUSED}
    for config in (LoraConfig, LoHaConfig, LoKrConfig):
        assert {field.name for field in dataclasses.fields(config)} <= listed


def test_every_tuner_of_the_installed_peft_is_listed() -> None:
    listed = {*adapter_fields.MERGED_TUNERS, *adapter_fields.OTHER_TUNERS, *adapter_fields.BESIDE_TUNERS}
    assert {one.value for one in PeftType} <= listed


@pytest.mark.parametrize("kind", [*adapter_fields.OTHER_TUNERS, *adapter_fields.BESIDE_TUNERS, "OF_TOMORROW"])
def test_another_tuner_is_refused_by_its_name(run: Path, kind: str) -> None:
    change_config(run / "lora", peft_type=kind)
    said = refused(run)
    assert "[not-lora]" in said
    assert kind in said
    assert adapter_fields.BY_PEFT[:20] in said or adapter_fields.BESIDE[:20] in said


def test_what_peft_writes_by_default_is_taken(made: Path) -> None:
    config = json.loads((made / "lora" / "adapter_config.json").read_text())
    assert (read_adapter_config(config, "x").alpha, read_adapter_config(config, "x").rank) == (8, 4)


REFUSED = {
    "alora_invocation_tokens": [1, 2],
    "megatron_config": {"num_layers": 2},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 2},
    "enable_lora": [True, False, True],
    "something_of_tomorrow": 7,
    "use_mora": 1,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_field_that_changes_the_sums_is_refused_by_name(run: Path, key: str) -> None:
    change_config(run / "lora", **{key: REFUSED[key]})
    stderr = refused(run)
    assert "[adapter-setting]" in stderr
    assert f"{key}:" in stderr
    change_config(run / "lora", **{key: None})
    merge(run)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "tomorrow"])
def test_an_initialisation_that_changes_the_base_is_refused(run: Path, init: str) -> None:
    """The hint's second way: with the residual base, `init_lora_weights: true` is true."""
    change_config(run / "lora", init_lora_weights=init)
    stderr = refused(run)
    assert init in stderr
    assert "path_initial_model_for_weight_conversion" in stderr
    assert "residual" in stderr
    change_config(run / "lora", init_lora_weights=True)
    merge(run)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_are_of_no_weight(run: Path, init: object) -> None:
    change_config(run / "lora", init_lora_weights=init)
    merge(run)


def test_pissa_converted_by_peft_is_right(tmp_path: Path) -> None:
    """The way out that the refusal names, followed with peft itself."""
    base = llama()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), init_lora_weights="pissa")
    start = opened(base, tmp_path / "base")
    first = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    from peft import get_peft_model

    begun = get_peft_model(start, first)
    begun.peft_config["default"].init_lora_weights = True
    begun.save_pretrained(tmp_path / "begun")
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    assert_same(merge(tmp_path), merged_state(model), 1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", "16"), ("lora_alpha", True),
        ("lora_alpha", [8]), ("r", 0), ("r", -4), ("r", 4.5), ("r", "4"), ("use_rslora", "false"), ("use_rslora", 2),
        ("alpha_pattern", {"q_proj": float("nan")}), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", [4]),
        ("bias", "some"), ("layers_to_transform", ["0"]), ("trainable_token_indices", {"embed_tokens": [-1]}),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused(run: Path, key: str, value: object) -> None:
    change_config(run / "lora", **{key: value})
    stderr = refused(run)
    assert "[odd-setting]" in stderr
    assert f"`{key}" in stderr


@pytest.mark.parametrize("flag", [1, True, 1.0])
def test_one_is_true(run: Path, flag: object) -> None:
    change_config(run / "lora", use_rslora=True)
    truth = {name: array.tobytes() for name, array in merge(run).items()}
    shutil.rmtree(run / "out")
    change_config(run / "lora", use_rslora=flag)
    assert {name: array.tobytes() for name, array in merge(run).items()} == truth
    shutil.rmtree(run / "out")
    change_config(run / "lora", use_rslora=0)
    assert {name: array.tobytes() for name, array in merge(run).items()} != truth


@pytest.mark.parametrize("alpha", [0, -8])
def test_an_alpha_that_adds_nothing_or_takes_off_is_told(run: Path, alpha: int) -> None:
    change_config(run / "lora", lora_alpha=alpha)
    merge(run)
    assert any("lora_alpha" in warning for warning in sm.plan(run / "mapping.yaml").warnings)


# --- what the config promises


def test_half_of_the_layers_is_no_adapter(run: Path) -> None:
    """peft adapts every module of the names in target_modules; a file of one pipeline stage holds some."""
    names = ("q_proj.lora_A.weight", "q_proj.lora_B.weight")
    start = "base_model.model.model.layers.1.self_attn."
    change_tensors(run / "lora", dict.fromkeys(start + name for name in names))
    stderr = refused(run)
    assert "[adapter-incomplete]" in stderr
    assert "model.layers.1.self_attn.q_proj" in stderr
    change_config(run / "lora", target_modules=["layers.0.self_attn.q_proj", "v_proj"])
    merge(run)  # the hint, followed


@pytest.mark.parametrize(
    "settings",
    [{"layers_to_transform": [0]}, {"layers_to_transform": 1}, {"exclude_modules": ["layers.1.self_attn.q_proj"]},
     {"exclude_modules": r".*layers\.1\.self_attn\.q_proj"}, {"target_modules": r".*\.0\.self_attn\.(q|v)_proj"}],
)  # fmt: skip
def test_what_was_not_to_be_adapted_is_not_missed(tmp_path: Path, settings: dict[str, object]) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    model = trained(opened(base, tmp_path / "base"), tmp_path / "lora", **settings)
    assert_same(merge(tmp_path), merged_state(model))


def test_a_module_that_was_to_be_saved_and_is_not_there(run: Path) -> None:
    change_config(run / "lora", modules_to_save=["lm_head"])
    assert "[adapter-incomplete]" in (stderr := refused(run))
    assert "lm_head" in stderr
    change_config(run / "lora", modules_to_save=["score", "classifier"])  # peft's own for every classifier
    merge(run)


def test_dora_by_config_and_by_tensors(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    trained(opened(base, tmp_path / "base"), tmp_path / "lora", use_dora=True)
    change_config(tmp_path / "lora", use_dora=False)
    assert "[adapter-setting]" in refused(tmp_path)
    change_config(tmp_path / "lora", use_dora=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    change_tensors(tmp_path / "lora", {name: None})
    assert "[adapter-incomplete]" in refused(tmp_path)
