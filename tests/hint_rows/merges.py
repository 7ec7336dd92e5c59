"""Mistakes in merges: numbers that differ from tensor to tensor, and directions without a mean."""

from __future__ import annotations

from tests.following import Row
from tests.hint_rows.given import told
from tests.test_mistakes import GQA

NORM = "m:model.norm.weight"


def scaled(factor: str) -> str:
    """A mapping whose one rule scales every tensor."""
    return f'{GQA}  "{{rest...}}": {{op: scale, of: "m:{{rest...}}", factor: {factor}}}\n'


ROWS = [
    Row(
        "directions that add up to nothing",
        GQA + '  "old.{rest...}": "m:{rest...}"\n'
        f"  made: {{op: multislerp, of: [{NORM}, {NORM}, {NORM}], normalize: false, weights: [1, -0.5, -0.5]}}\n",
        "no-mean",
        told("other weights", "[1, -0.5, -0.5]", "[1, 0.5, 0.5]"),
    ),
    Row(
        "filters without a fallback",
        scaled("[{filter: mlp, value: 1}]"),
        "op-value",
        told("`- value: NUMBER`", "value: 1}]", "value: 1}, {value: 2}]"),
    ),
    Row(
        "a filter that fits nothing",
        scaled("[{filter: mpl, value: 1}, {value: 2}]"),
        "no-effect",
        told("a part of a target's name", "mpl", "mlp"),
    ),
    Row(
        "a case without a value",
        scaled("[{filter: mlp}, {value: 2}]"),
        "missing-parameter",
        told("`value: NUMBER`", "filter: mlp", "filter: mlp, value: 1"),
    ),
    Row(
        "numbers and filters in one list",
        scaled("[{filter: mlp, value: 1}, 2]"),
        "wrong-kind",
        told("`- value: NUMBER`", ", 2]", ", {value: 2}]"),
    ),
    Row(
        "a card of no target",
        GQA.replace("output: out", "output: {path: out, card: true}")
        + '  "{r...}": {op: scale, of: "m:{r...}", factor: 2}\n',
        "no-effect",
        told("`target: {name: hf/model, text: SOURCE}`", "tensors:", "target: {name: hf/model, text: m}\ntensors:"),
    ),
    Row("no points", scaled("[]"), "wrong-kind", told("at least one number", "[]", "[2]")),
]
