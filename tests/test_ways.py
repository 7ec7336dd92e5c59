"""What a plan says happens to tensors, on checkpoints written by torch and safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge.plan.origins import origins_table
from shardmerge.plan.ways import way_of
from tests.terminal import CONTROL, in_terminal, plain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {
        "embed.weight": torch.randn(13, 8),
        "qkv.weight": torch.randn(16, 8),
        "up.weight": torch.randn(6, 8).bfloat16(),
        "gate.weight": torch.randn(6, 8).bfloat16(),
        "cube": torch.randn(2, 3, 4),
        "a.weight": torch.randn(4, 8),
        "b.weight": torch.randn(16, 4),
        "e.0.w": torch.randn(2, 3),
        "e.1.w": torch.randn(2, 3),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path


# A rule, and what the plan says of it, with an output in BF16.
WAYS = [
    ("m:up.weight", "copied"),
    ("m:embed.weight", "F32 -> BF16"),
    ("{op: transpose, of: 'm:up.weight', dim0: 0, dim1: 1}", "transposed"),
    ("{op: transpose, of: 'm:qkv.weight', dim0: 0, dim1: 1}", "transposed, F32 -> BF16"),
    ("{op: permute, of: 'm:cube', dims: [2, 0, 1]}", "dims permuted [2, 0, 1], F32 -> BF16"),
    ("{op: split, of: 'm:qkv.weight', dim: 0, sizes: [8, 4, 4], take: 1}", "split in 3 (8 + 4 + 4 rows), F32 -> BF16"),
    ("{op: split, of: 'm:up.weight', dim: 1, sizes: [5, 3], take: 1}", "split in 2 (5 + 3 columns)"),
    ("{op: chunk, of: 'm:qkv.weight', dim: 0, chunks: 4, take: 3}", "split in 4 equal parts (rows), F32 -> BF16"),
    ("{op: slice, of: 'm:up.weight', dim: 0, stop: 4}", "first 4 of 6 rows"),
    ("{op: slice, of: 'm:up.weight', dim: 1, start: 2, stop: -1}", "columns 2:7 of 8"),
    ("{op: concat, of: ['m:gate.weight', 'm:up.weight'], dim: 0}", "2 joined (rows)"),
    ("{op: concat, of: ['m:gate.weight', 'm:qkv.weight'], dim: 0}", "2 joined (rows)"),
    ("{op: stack, of: ['m:e.0.w', 'm:e.1.w'], dim: 0}", "2 stacked, F32 -> BF16"),
    ("{op: unstack, of: 'm:cube', dim: 0, count: 2, take: 1}", "unstacked from 2, F32 -> BF16"),
    ("{op: reshape, of: 'm:up.weight', shape: [8, 6]}", "reshaped"),
    ("{op: lora, a: 'm:a.weight', b: 'm:b.weight', of: 'm:qkv.weight'}", "LoRA r 4 merged, F32 -> BF16"),
    (
        "{op: concat, of: ['m:embed.weight', {op: new_rows, of: 'm:embed.weight', rows: 3}], dim: 0}",
        "13 -> 16 rows (new rows: mean), F32 -> BF16",
    ),
    (
        "{op: concat, of: ['m:embed.weight', {op: new_rows, of: 'm:embed.weight', rows: 3, new: copy, row: 2}]}",
        "13 -> 16 rows (new rows: copy of row 2), F32 -> BF16",
    ),
    ("{op: fill, shape: [2], dtype: float32, value: 0.5}", "filled with 0.5"),
]


@pytest.mark.parametrize(("rule", "said"), WAYS, ids=[rule for rule, _ in WAYS])
def test_a_way_in_words(rule: str, said: str, folder: Path) -> None:
    mapping = folder / "w.yaml"
    mapping.write_text(
        "shardmerge: 1\nsources: {m: m.safetensors}\noutput: {path: out, dtype: bfloat16}\n"
        f"tensors: {{w: {rule}, 'rest.{{r...}}': 'm:{{r...}}'}}\n"
    )
    (tensor,) = (one for one in sm.plan(mapping).tensors() if one.name == "w")
    assert way_of(tensor.entry) == said


GROWN = '{op: concat, of: ["m:embed.weight", {op: new_rows, of: "m:embed.weight", rows: 3}], dim: 0}'
NAMES = """\
shardmerge: 1
sources: {m: m.safetensors, other: o.safetensors}
output: {path: out, dtype: bfloat16}
tensors:
  model.embed_tokens.weight: GROWN
  lm_head.weight: GROWN
  model.layers.0.q.weight: {op: split, of: "m:qkv.weight", dim: 0, sizes: [8, 4, 4], take: 0}
  model.layers.0.k.weight: {op: split, of: "m:qkv.weight", dim: 0, sizes: [8, 4, 4], take: 1}
  model.layers.0.v.weight: {op: split, of: "m:qkv.weight", dim: 0, sizes: [8, 4, 4], take: 2}
  model.up.weight: m:up.weight
  model.gate.weight: m:gate.weight
  vision.{r...}: other:{r...}
drop: ["m:cube", "m:{x:a|b}.weight", "m:e.{i}.w"]
"""


@pytest.fixture
def names(folder: Path) -> Path:
    save_file({f"blocks.{n}.weight": torch.randn(2, 2) for n in range(5)}, folder / "o.safetensors")
    path = folder / "names.yaml"
    path.write_text(NAMES.replace("GROWN", GROWN))
    return path


def test_few_tensors_are_named_and_many_counted(names: Path) -> None:
    """In the order of the sources, the largest first."""
    table = origins_table(sm.plan(names))
    assert table.head == ("from", "target", "tensors", "bytes", "how")
    assert list(table.rows) == [
        ("m (safetensors)", "embed_tokens, lm_head", "2", "512 B", "13 -> 16 rows (new rows: mean), F32 -> BF16"),
        ("m (safetensors)", "k, q, v", "3", "256 B", "split in 3 (8 + 4 + 4 rows), F32 -> BF16"),
        ("m (safetensors)", "gate, up", "2", "192 B", "copied"),
        ("other (safetensors)", "vision.*", "5", "40 B", "F32 -> BF16"),
    ]


def test_a_name_that_several_modules_have_is_not_told(folder: Path) -> None:
    """``w`` of which of the two? Both components take several roads."""
    path = folder / "same.yaml"
    path.write_text(
        "shardmerge: 1\nsources: {m: m.safetensors}\noutput: {path: out, dtype: bfloat16}\n"
        "tensors: {x.w.weight: 'm:up.weight', x.y.weight: 'm:embed.weight', "
        "z.w.weight: 'm:gate.weight', z.u.weight: 'm:a.weight'}\n"
        "drop: ['m:cube', 'm:b.weight', 'm:qkv.weight', 'm:e.{i}.w']\n"
    )
    rows = [(target, how) for _, target, _, _, how in origins_table(sm.plan(path)).rows]
    assert rows == [("u, y", "F32 -> BF16"), ("x.w", "copied"), ("z.w", "copied")]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_plan_fits_a_terminal(columns: int, names: Path) -> None:
    shown = plain(in_terminal("plan", names, columns=columns))
    path = max(len(word) for word in shown.split())
    assert max(map(len, shown.splitlines())) <= max(columns, path + 6)
    lines = shown.splitlines()
    head = next(line for line in lines if line.startswith("from "))
    rows = lines[lines.index(head) + 1 :]
    rows = rows[: rows.index("")]
    at = head.index("target")
    assert all(line[at - 2 : at] == "  " for line in rows)  # columns are whole
    cells = ["".join(line[at : head.index("tensors")].strip() for line in rows)]
    assert "embed_tokens,lm_head" in cells[0].replace(" ", "")
    how = "".join(line[head.index("how") :].strip() for line in rows).replace(" ", "")
    assert "13->16rows(newrows:mean),F32->BF16" in how  # not a letter is lost


def test_a_wide_terminal_shows_what_a_pipe_gets(names: Path) -> None:
    from tests.conftest import shardmerge

    shown = in_terminal("plan", names, columns=400)
    assert plain(shown) == shardmerge("plan", names).stdout
    assert "\x1b[1mfrom " in shown
    assert not CONTROL.search(in_terminal("--color", "never", "plan", names, columns=80))


def test_words_of_usual_length_are_whole_at_80_columns() -> None:
    """The widest column gives way, down to its longest word, or to a third of the screen if that is longer."""
    program = (
        "from shardmerge.cli.tables import show_table; from shardmerge.plan.tables import TextTable\n"
        "row = ('trained (fp32 partitions, group 0) + other', 'multi_modal_projector.*', '45,395', 'a_name_' * 9)\n"
        "show_table(TextTable(('from', 'target', 'tensors', 'how'), [row], frozenset({2})))\n"
    )
    shown = plain(in_terminal(program=("-c", program), columns=80))
    assert max(map(len, shown.splitlines())) <= 80
    assert all(word in shown for word in ("partitions,", "multi_modal_projector.*", " 45,395"))
    at = shown.splitlines()[0].index("how")
    assert "".join(line[at:].strip() for line in shown.splitlines()[1:]) == "a_name_" * 9
