"""Checkpoints saved by real tools: every tensor against the truth that came with it, through every entry point."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import shardmerge as sm
from shardmerge.dtypes import DTYPES
from tests.conftest import GOLDEN, read_all, same_values, shardmerge

ZERO = sorted(path.parent for path in GOLDEN.glob("zero/*/case.json"))
XTUNER = sorted(path.parent for path in GOLDEN.glob("xtuner/*/case.json"))
TRAINER = sorted(GOLDEN.glob("hf_trainer/checkpoint-*"))


def entry_of(case: Path) -> Path:
    """The tag that the case's `latest` names, or the XTuner checkpoint."""
    return case / json.loads((case / "case.json").read_text())["entry"]


def truth_of(case: Path) -> dict[str, object]:
    return {name: tensor.to_dense() for name, tensor in load_file(case / "truth.safetensors").items()}


def assert_is_truth(found: dict, case: Path) -> None:
    truth = truth_of(case)
    assert set(found) == set(truth)
    for name, tensor in truth.items():
        wide = tensor.double() if tensor.is_floating_point() else tensor
        assert same_values(found[name], wide.numpy()), name


def test_the_golden_folder_is_whole() -> None:
    assert len(ZERO) >= 40
    assert len(XTUNER) >= 6
    kinds = {json.loads((case / "case.json").read_text())["stage"] for case in ZERO}
    assert kinds == {0, 1, 2, 3}


@pytest.mark.parametrize("case", ZERO + XTUNER, ids=lambda case: case.name)
def test_every_tensor_has_the_bits_of_the_truth(case: Path) -> None:
    assert_is_truth(read_all(sm.inspect(entry_of(case))), case)


@pytest.mark.parametrize("case", ZERO, ids=lambda case: case.name)
def test_convert_to_float32_equals_zero_to_fp32(case: Path, tmp_path: Path) -> None:
    """The whole road, through files; integers and booleans stay what they are."""
    sm.convert(entry_of(case), tmp_path / "out", options=sm.Options(dtype=DTYPES["F32"], sync=False))
    assert_is_truth(read_all(sm.inspect(tmp_path / "out")), case)
    for tensor in sm.open_checkpoint(tmp_path / "out").values():
        assert tensor.dtype.name == "F32" or tensor.dtype.kind != "float"
    sm.verify(tmp_path / "out")


def test_every_entry_point_gives_the_same_checkpoint(tmp_path: Path) -> None:
    save_dir = shutil.copytree(GOLDEN / "zero" / "llama_z2_w2_bf16" / "ckpt", tmp_path / "checkpoint-2")
    tag = save_dir / (save_dir / "latest").read_text().strip()
    expected = read_all(sm.inspect(tag))
    entries = [save_dir, *tag.glob("*_states.pt")]
    for entry in entries:
        found = read_all(sm.inspect(entry))
        assert found.keys() == expected.keys()
        assert all(same_values(found[name], expected[name]) for name in expected)
    (save_dir / "latest").unlink()  # XTuner and hand-made copies have none
    assert len(sm.inspect(save_dir).entries) == len(expected)


def test_a_work_dir_is_entered_by_its_last_checkpoint(tmp_path: Path) -> None:
    work = shutil.copytree(GOLDEN / "xtuner" / "frozen_z2" / "work_dirs", tmp_path / "work_dirs")
    assert_is_truth(read_all(sm.inspect(work)), GOLDEN / "xtuner" / "frozen_z2")
    (work / "last_checkpoint").write_text("/home/somebody/else/work_dirs/iter_2.pth")  # the run moved
    assert_is_truth(read_all(sm.inspect(work)), GOLDEN / "xtuner" / "frozen_z2")
    (work / "last_checkpoint").write_text("iter_9.pth")
    assert "[missing-tag]" in shardmerge("inspect", work, code=1).stderr


@pytest.mark.parametrize("text", ["..", "../work", ".", "", "{work}"])
def test_a_last_checkpoint_that_leads_in_a_circle(text: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "last_checkpoint").write_text(text.format(work=work))
    assert "names a checkpoint that is not there [missing-tag]" in shardmerge("inspect", work, code=1).stderr


@pytest.mark.parametrize("text", ["1" * 4000, "\0", "a/" + "é" * 128])
@pytest.mark.parametrize("marker", ["latest", "latest_checkpointed_iteration.txt", "last_checkpoint"])
def test_a_marker_that_holds_no_name(text: str, marker: str, tmp_path: Path) -> None:
    (tmp_path / marker).write_text(text)
    assert f"'{marker}' holds something else" in shardmerge("inspect", tmp_path, code=1).stderr


def test_the_16_bit_view_is_the_module() -> None:
    case = GOLDEN / "zero" / "llama_z2_w2_bf16"
    catalog = sm.inspect(case / "ckpt", view="module")
    assert {entry.dtype.name for entry in catalog.entries.values()} == {"BF16"}
    truth = truth_of(case)
    found = read_all(catalog)
    for name, array in found.items():
        assert same_values(array, truth[name].bfloat16().double().numpy()), name
    done = shardmerge("inspect", GOLDEN / "zero" / "llama_z3_w2_bf16" / "ckpt", "--view", "module", code=1)
    assert "[no-module-view]" in done.stderr


@pytest.mark.parametrize("case", [case for case in ZERO if "tied" in case.name], ids=lambda case: case.name)
def test_tied_weights_are_one_tensor_with_two_names(case: Path) -> None:
    catalog = sm.inspect(case / "ckpt")
    assert len(catalog.aliases) == 1
    (alias, owner), *_ = catalog.aliases.items()
    assert alias not in catalog.entries
    assert owner in catalog.entries


@pytest.mark.parametrize("case", TRAINER, ids=lambda case: case.name)
def test_a_trainer_checkpoint_keeps_its_side_files(case: Path, tmp_path: Path) -> None:
    sm.convert(case, tmp_path / "out", options=sm.Options(dtype=DTYPES["BF16"], sync=False))
    assert (tmp_path / "out" / "config.json").is_file()


def test_inspect_json_lists_names_types_shapes_and_bytes() -> None:
    case = GOLDEN / "zero" / "bag_z2_w3_bf16"
    listed = json.loads(shardmerge("inspect", case / "ckpt", "--json").stdout)["tensors"]
    truth = truth_of(case)
    assert {row["name"] for row in listed} == set(truth)
    for row in listed:
        assert set(row) == {"name", "dtype", "shape", "nbytes"}
        assert row["shape"] == list(truth[row["name"]].shape)
        assert row["dtype"] in DTYPES
