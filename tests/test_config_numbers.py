"""Numbers and switches of foreign configs: finite where they are computed with, and 1 is true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardmerge
from shardmerge.errors import ShardmergeError, TargetError
from shardmerge.targets.config_numbers import dimension, finite, flag
from shardmerge.targets.foreign_configs import feed_forward_width
from shardmerge.targets.open_clip_config import _ratio
from shardmerge.targets.training_config import read_training_config

ODD = ["NaN", "Infinity", "-Infinity", "1e999", '"16"', "[16]", "true", f"1{'0' * 400}"]


@pytest.mark.parametrize("text", ODD)
def test_a_number_that_is_used_is_finite(text: str) -> None:
    config = json.loads(f'{{"scale": {text}}}')
    with pytest.raises(TargetError) as caught:
        finite(config, "scale", 1.0, "config.json")
    assert (caught.value.code, caught.value.where) == ("odd-config", "config.json")
    if not text.startswith("1"):
        with pytest.raises(TargetError):
            dimension(config, "scale", 1, "config.json")


@pytest.mark.parametrize(("text", "value"), [("16", 16.0), ("0.5", 0.5), ("null", 2.0)])
def test_other_numbers_are_what_they_say(text: str, value: float) -> None:
    assert finite(json.loads(f'{{"scale": {text}}}'), "scale", 2.0, "") == value


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False), ("null", False)]
)
def test_a_switch_is_what_python_takes_it_for(text: str, value: bool) -> None:
    assert flag(json.loads(f'{{"use_rslora": {text}}}'), "use_rslora", "") is value


@pytest.mark.parametrize("text", ['"true"', "2", "0.0", "[]", "NaN"])
def test_anything_else_is_no_switch(text: str) -> None:
    with pytest.raises(TargetError):
        flag(json.loads(f'{{"use_rslora": {text}}}'), "use_rslora", "")


def test_sizes_that_follow_from_a_number(tmp_path: Path) -> None:
    """NaN times a width is no width, and was an error of ours."""
    with pytest.raises(TargetError):
        _ratio({"mlp_ratio": float("nan")}, "open_clip_config.json")
    assert feed_forward_width(4096, 1.0, 256) == 11008


def _formula(folder: Path, number: str, formula: str = "f * 2") -> Path:
    folder.mkdir()
    save_file({"a": np.ones(4, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"factor": {number}}}')
    (folder / "mapping.yaml").write_text(
        "shardmerge: 1\nsources: {s: model.safetensors}\noutput: {path: out}\nlet: {f: s.config.factor}\n"
        f'tensors:\n  a: {{op: scale, of: "s:a", factor: {formula}}}\n'
    )
    return folder / "mapping.yaml"


@pytest.mark.parametrize("formula", ["f", "f * 2"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "true"])
def test_a_formula_over_a_config_is_finite(tmp_path: Path, number: str, formula: str) -> None:
    with pytest.raises(ShardmergeError) as caught:
        shardmerge.run(_formula(tmp_path / "case", number, formula))
    assert caught.value.exit_code == 1
    assert caught.value.code == "bad-formula"
    assert not (tmp_path / "case" / "out").exists()


def test_a_formula_over_a_finite_number_is_computed(tmp_path: Path) -> None:
    shardmerge.run(_formula(tmp_path / "case", "1.5"))
    assert load_file(tmp_path / "case" / "out" / "model.safetensors")["a"].tolist() == [3.0] * 4


@pytest.mark.parametrize(
    ("field", "alpha", "rslora"),
    [("lora_alpha=16", 16, False), ("lora_alpha=16, use_rslora=1", 16, True), ("lora_alpha=1e999", None, False)],
)
def test_an_adapter_of_a_training_config(field: str, alpha: float | None, rslora: bool) -> None:
    text = f"model = dict(type='LLaVAModel', llm_lora=dict(r=8, {field}))"
    facts = read_training_config(text).llm_lora
    assert facts is not None
    assert (facts.alpha, facts.rslora) == (alpha, rslora)
