"""What decides values is said wherever the result is: on stderr under -q, in the summary, in JSON, in the receipt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from tests.conftest import shardmerge

WARNED = "2 tensors beside state_dict are not part of it: scale, shift"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A torch file with two tensors beside the state dict: part of the model or not, nobody can see."""
    beside = {"scale": torch.ones(2), "shift": torch.zeros(2)}
    torch.save({"state_dict": {"a.weight": torch.ones(4, 3)}, **beside}, tmp_path / "run.pth")
    return tmp_path / "run.pth"


@pytest.fixture
def mapping(source: Path) -> Path:
    text = f"shardmerge: 1\nsources: {{m: {source}}}\noutput: out\ntensors: {{'{{rest...}}': 'm:{{rest...}}'}}\n"
    (source.parent / "mapping.yaml").write_text(text)
    return source.parent / "mapping.yaml"


@pytest.mark.parametrize("quiet", [(), ("-q",), ("--json",)])
def test_stderr_has_it_with_every_way_to_run(mapping: Path, source: Path, quiet: tuple[str, ...]) -> None:
    assert f"warning: m: {WARNED}\n" in shardmerge("run", mapping, *quiet).stderr
    assert f"warning: source: {WARNED}\n" in shardmerge("convert", source, source.parent / "c", *quiet).stderr


def test_plan_summary_json_and_receipt_have_it(mapping: Path) -> None:
    assert f"warning: m: {WARNED}\n" in shardmerge("plan", mapping).stdout
    assert f"m: {WARNED}" in json.loads(shardmerge("plan", mapping, "--json").stdout)["warnings"]
    out = mapping.parent / "out"
    assert f"warning: m: {WARNED}\n" in shardmerge("run", mapping).stderr
    assert json.loads((out / "shardmerge.json").read_text())["warnings"] == [f"m: {WARNED}"]
    answer = json.loads(shardmerge("run", mapping, "--out", out.with_name("again"), "--json").stdout)
    assert answer["warnings"] == [f"m: {WARNED}"]
    assert answer["schema"] == 1


def test_inspect_and_python_have_it(source: Path) -> None:
    assert f"warning: {WARNED}\n" in shardmerge("inspect", source).stdout
    assert json.loads(shardmerge("inspect", source, "--json").stdout)["warnings"] == [WARNED]
    assert WARNED in sm.open_checkpoint(source).notes


def test_no_warning_is_in_what_the_plan_is_known_by(mapping: Path) -> None:
    """A better word in a later version does not change what a plan is."""
    assert WARNED not in json.dumps(json.loads(shardmerge("plan", mapping, "--json").stdout)["plan"])


def test_warnings_of_shards_are_those_of_the_model(tmp_path: Path) -> None:
    files = {"pytorch_model-00001-of-00002.bin": "a", "pytorch_model-00002-of-00002.bin": "b"}
    for file, name in files.items():
        torch.save({"state_dict": {f"{name}.weight": torch.ones(2, 2)}, "lost": torch.ones(3)}, tmp_path / file)
    weight_map = {f"{name}.weight": file for file, name in files.items()}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sm.inspect(tmp_path).warnings == ("1 tensors beside state_dict are not part of it: lost",)


def test_notes_stand_in_the_receipt(tmp_path: Path, golden: Path) -> None:
    shardmerge("convert", golden / "zero" / "llama_z2_w2_bf16" / "ckpt", tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "shardmerge.json").read_text())
    assert "fp32 view of 2 rank(s)" in receipt["sources"]["source"]["notes"]


def test_nothing_is_warned_of_an_ordinary_checkpoint(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    assert "warning" not in shardmerge("convert", tmp_path / "m.safetensors", tmp_path / "out").stderr
