"""Numbers that differ from tensor to tensor: filters and gradients in the parameters of ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from docs.tiny import run_rules
from shardmerge.errors import MappingError

NAMES = [*(f"layers.{i}.{part}.weight" for i in range(5) for part in ("attn", "mlp")), "embed.weight"]
ONES = {"src": {name: np.ones(2, np.float32) for name in NAMES}}


def scaled(factor: str, folder: Path) -> dict[str, float]:
    made = run_rules(f'"{{r...}}": {{op: scale, of: "src:{{r...}}", factor: {factor}}}', ONES, folder)
    return {name: float(values[0]) for name, values in made.items()}


def test_layers_lie_on_lines_between_points(tmp_path: Path) -> None:
    made = scaled("[0, 1, 0.5]", tmp_path)
    assert [made[f"layers.{i}.attn.weight"] for i in range(5)] == [0, 0.5, 1, 0.75, 0.5]
    assert made["embed.weight"] == 0  # of no layer: the first point


def test_the_first_filter_in_the_name_decides(tmp_path: Path) -> None:
    made = scaled("[{filter: attn, value: [1, 3]}, {filter: layers, value: 7}, {value: 1 / 4}]", tmp_path)
    assert [made[f"layers.{i}.attn.weight"] for i in range(5)] == [1, 1.5, 2, 2.5, 3]
    assert {made[f"layers.{i}.mlp.weight"] for i in range(5)} == {7}
    assert made["embed.weight"] == 0.25


def test_one_layer_is_the_last(tmp_path: Path) -> None:
    rule = '"{r...}": {op: scale, of: "src:{r...}", factor: [1, 2, 3]}'
    made = run_rules(rule, {"src": {"l.0.w": np.ones(1, np.float32), "w": np.ones(1, np.float32)}}, tmp_path)
    assert {name: values[0] for name, values in made.items()} == {"l.0.w": 3, "w": 1}


def test_each_model_has_its_own(tmp_path: Path) -> None:
    sources = {name: {key: np.full(2, value, np.float32) for key in NAMES} for name, value in (("a", 1), ("src", 10))}
    weights = "[1, [{filter: mlp, value: 0}, {value: [0, 1]}]]"
    rule = f'"{{r...}}": {{op: linear, of: ["a:{{r...}}", "src:{{r...}}"], weights: {weights}}}'
    made = run_rules(rule, sources, tmp_path)
    assert {made[f"layers.{i}.mlp.weight"][0] for i in range(5)} == {1}
    assert [made[f"layers.{i}.attn.weight"][0] for i in range(5)] == [1, 3.5, 6, 8.5, 11]


@pytest.mark.parametrize(
    ("factor", "code", "words"),
    [
        ("[{filter: attn, value: 1}]", "op-value", "- value: NUMBER"),
        ("[{filter: atn, value: 1}, {value: 2}]", "no-effect", "a part of a target's name"),
        ("[{filter: layers, value: 1}, {filter: mlp, value: 1}, {value: 2}]", "no-effect", "move the line before"),
        ("[{pattern: attn, value: 1}, {value: 2}]", "unknown-key", ""),
        ("[{filter: attn}, {value: 2}]", "missing-parameter", "add `value: NUMBER`"),
        ("[1, {filter: attn, value: 2}]", "wrong-kind", "- value: NUMBER"),
        ("[1, two]", "unknown-value", ""),
        ("[]", "wrong-kind", "at least one number"),
    ],
)
def test_mistakes_are_said(factor: str, code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError) as caught:
        scaled(factor, tmp_path)
    assert caught.value.code == code
    assert words in caught.value.hint
