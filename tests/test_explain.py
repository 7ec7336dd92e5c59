"""`shardmerge explain`: the bytes it names are the tensor's, read with nothing but open() and numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge import api
from tests.conftest import shardmerge

MAPPING = """\
shardmerge: 1
sources: {src: model.safetensors}
output: {path: out, dtype: bfloat16}
tensors:
  q.weight: {op: split, of: "src:qkv.weight", dim: 0, sizes: [4, 2, 2], take: 0}
  both.weight:
    op: concat
    of: ["src:a.weight", "src:b.weight"]
  as_is: src:ids
drop: []
"""


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    state = {
        "qkv.weight": torch.randn(8, 3),
        "a.weight": torch.randn(2, 3),
        "b.weight": torch.randn(1, 3),
        "ids": torch.arange(5),
    }
    save_file(state, tmp_path / "model.safetensors")
    path = tmp_path / "m.yaml"
    path.write_text(MAPPING, "utf-8")
    return path


def leaf_of(node):
    while "of" in node:
        node = node["of"][0]
    return node


def bytes_at(place):
    with open(place["file"], "rb") as file:
        file.seek(place["offset"])
        return file.read(place["nbytes"])


def test_the_bytes_it_names_are_those_of_the_tensor(mapping: Path) -> None:
    story = api.explain_json(mapping, "as_is")
    result = sm.run(mapping)
    assert story["copy"] is True
    (piece,) = leaf_of(story["made"])["first_pieces"]
    assert np.array_equal(np.frombuffer(bytes_at(piece), "<i8"), np.arange(5))
    written = story["written"]
    place = {"file": result.path / written["file"], "offset": written["offset"], "nbytes": written["nbytes"]}
    assert bytes_at(place) == bytes_at(piece)
    assert (story["dtype"], story["shape"], story["nbytes"], story["bytes_read"]) == ("I64", [5], 40, 40)


def test_a_part_reads_its_own_bytes_only(mapping: Path) -> None:
    story = api.explain_json(mapping, "q.weight")
    leaf = leaf_of(story["made"])
    assert (leaf["source"], leaf["tensor"], leaf["shape"], leaf["nbytes"]) == ("src", "qkv.weight", [8, 3], 96)
    assert story["bytes_read"] == 48
    assert story["made"]["op"] == "cast F32 to BF16"
    assert story["made"]["of"][0]["op"] == "split dim 0 [4, 2, 2] part 0"


def test_text(mapping: Path) -> None:
    lines = api.explain_text(mapping, "both.weight").splitlines()
    assert lines[:5] == [
        "both.weight  BF16 [3, 3]  18 B",
        "rule     m.yaml:6:3 both.weight",
        "         both.weight:",
        "           op: concat",
        '           of: ["src:a.weight", "src:b.weight"]',
    ]
    made = [line for line in lines if line.startswith("  ")][3:]
    assert made[0] == "  concat dim 0  -> BF16 [3, 3]"
    assert made[1] == "    cast F32 to BF16  -> BF16 [2, 3]"
    assert made[2] == "      src:a.weight  F32 [2, 3]  (safetensors)"
    assert lines[-1].startswith("written  model.safetensors, bytes ")


def test_many_pieces_are_counted(golden: Path, tmp_path: Path) -> None:
    checkpoint = golden / "zero" / "specks_z3_w4_bf16" / "ckpt"
    path = tmp_path / "m.yaml"
    path.write_text(
        f'shardmerge: 1\nsources: {{t: "{checkpoint}"}}\ntensors:\n  "{{rest...}}": "t:{{rest...}}"\n', "utf-8"
    )
    widest = max(sm.inspect(checkpoint).entries.values(), key=lambda entry: len(entry.pieces))
    story = leaf_of(api.explain_json(path, widest.name)["made"])
    assert story["pieces"] == len(widest.pieces) > 1
    assert len(story["first_pieces"]) == min(4, story["pieces"])
    assert f"{widest.name}  " in api.explain_text(path, widest.name)


def test_a_rule_of_a_preset_is_shown_as_the_preset_writes_it(golden: Path, tmp_path: Path) -> None:
    xtuner = golden / "xtuner"
    path = tmp_path / "m.yaml"
    path.write_text(
        f"shardmerge: 1\nsources:\n  trained: {xtuner}/frozen_z2/work_dirs/iter_2.pth\n  llm: {xtuner}/base_llm\n"
        f"  vision: {xtuner}/base_clip\nuse: xtuner/llava-to-hf\n",
        "utf-8",
    )
    story = api.explain_json(path, "multi_modal_projector.linear_1.weight")
    assert story["rule_lines"] == ["multi_modal_projector.linear_1.{p}: trained:projector.model.0.{p}"]
    assert leaf_of(story["made"])["tensor"] == "projector.model.0.weight"


def test_an_unknown_name_gets_the_near_ones(mapping: Path) -> None:
    with pytest.raises(sm.UsageError) as raised:
        api.explain_text(mapping, "q.wieght")
    assert raised.value.code == "unknown-tensor"
    assert "q.weight" in raised.value.hint


def test_on_the_command_line(mapping: Path) -> None:
    assert json.loads(shardmerge("explain", mapping, "--tensor", "as_is", "--json").stdout)["name"] == "as_is"
    assert "rule     m.yaml:5:3 q.weight" in shardmerge("explain", mapping, "--tensor", "q.weight").stdout
    assert "[unknown-tensor]" in shardmerge("explain", mapping, "--tensor", "nothing", code=2).stderr
