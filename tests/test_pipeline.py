"""Pipelines of DeepSpeed: each tensor against the truth, every way in, and what is wrong with their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge as sm
from tests.conftest import GOLDEN, read_all, same_values, shardmerge
from tests.counting import refusal
from tests.test_golden import assert_is_truth, truth_of

CASES = [case for case in sorted((GOLDEN / "pipeline").iterdir()) if not case.name.startswith("universal")]
UNNAMED = ("pp2_z0_w2_bf16", "pp2_z0_w4_bf16", "pp2_z0_w2_fp32", "pp2_tied_z0_w2_bf16")


def ckpt(name: str) -> Path:
    return GOLDEN / "pipeline" / name / "ckpt"


def tag_of(save_dir: Path) -> Path:
    return save_dir / (save_dir / "latest").read_text()


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Gives a copy of a case: its tag directory."""
    return lambda name: tag_of(shutil.copytree(ckpt(name), tmp_path / name))


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Saves what a change makes of what torch reads, under the same name."""
    torch.save(change(torch.load(path, weights_only=False)), path)


def refused(path: Path, view: str = "fp32") -> sm.ShardmergeError:
    return refusal(lambda: sm.inspect(path, view=view))[0]


def test_the_folder_has_ties_both_stages_and_older_versions() -> None:
    cases = [json.loads((case / "case.json").read_text()) for case in CASES]
    assert {case["stage"] for case in cases} == {0, 1}
    assert {case["deepspeed"] for case in cases} == {"0.16.9", "0.19.8"}
    assert sum("tied" in case["name"] for case in cases) >= 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_tensor_has_the_bits_of_the_truth(case: Path, tmp_path: Path) -> None:
    catalog = sm.inspect(case / "ckpt")
    assert_is_truth(read_all(catalog), case)
    sm.convert(case / "ckpt", tmp_path / "out", options=sm.Options(sync=False))
    assert_is_truth(read_all(sm.inspect(tmp_path / "out")), case)


@pytest.mark.parametrize("name", ["pp2_z1_w4_bf16", "pp2_tied_bias_z1_w2_bf16", "pp2_z0_w2_bf16"])
def test_every_entry_point_gives_the_same_checkpoint(name: str) -> None:
    save_dir = ckpt(name)
    tag = tag_of(save_dir)
    expected = sm.inspect(tag)
    for entry in (save_dir, *tag.glob("*_states.pt")):
        found = sm.inspect(entry)
        assert found.entries == expected.entries
        assert found.absent == frozenset()


@pytest.mark.parametrize("case", [case for case in CASES if "tie" not in case.name], ids=lambda case: case.name)
def test_the_16_bit_view_is_the_layer_files(case: Path, tmp_path: Path) -> None:
    tag = tag_of(shutil.copytree(case / "ckpt", tmp_path / "ckpt"))
    for path in tag.glob("*_optim_states.pt"):  # it is the way out where they are lost
        path.unlink()
    found = read_all(sm.inspect(tag, view="module"))
    truth = truth_of(case)
    assert set(found) == set(truth)
    for name, value in truth.items():
        layer, _, leaf = name.partition(".")
        saved = torch.load(tag / f"layer_{int(layer):02d}-model_states.pt", weights_only=False)[leaf]
        assert same_values(found[name], saved.double().numpy() if saved.is_floating_point() else saved.numpy())
        assert value.to(saved.dtype).equal(saved)


def test_the_16_bit_view_calls_tied_modules_by_their_layers() -> None:
    """Which of them is whose takes the masters."""
    names = set(sm.inspect(ckpt("pp2_tied_bias_z1_w2_bf16"), view="module").names())
    assert {"0.weight", "0.bias", "6.weight", "6.bias"} < names
    assert not any("tied" in name for name in names)


def test_tied_modules_are_there_once_and_what_is_not_tied_of_them_twice() -> None:
    catalog = sm.inspect(ckpt("pp2_tied_bias_z1_w2_bf16"))
    tied = [name for name in catalog.names() if "tied_modules" in name]
    assert tied == ["tied_modules.one.weight", "tied_modules.one.bias", "stage_1.tied_modules.one.bias"]
    assert "stage_1.tied_modules.one.bias" in " ".join(catalog.warnings)
    assert sm.inspect(ckpt("pp2_tied_z1_w2_bf16")).warnings == ()


def test_a_parameter_of_two_layers_is_one_with_two_names() -> None:
    """The second layer's file has it too, in 16 bits."""
    catalog = sm.inspect(ckpt("pp1_shared_z1_w2_bf16"))
    assert catalog.aliases == {"5.weight": "0.weight"}
    assert catalog["5.weight"].dtype.name == "F32"
    assert catalog.warnings == ()


def test_what_is_frozen_is_told_of() -> None:
    assert "['1.weight', '2.b.weight']" in " ".join(sm.inspect(ckpt("pp2_frozen_z1_w2_bf16")).warnings)


@pytest.mark.parametrize("name", UNNAMED)
def test_stage_0_says_where_it_is_16_bit_and_what_it_cannot_know(name: str) -> None:
    catalog = sm.inspect(ckpt(name))
    said = " ".join(catalog.warnings)
    assert ("the 16-bit weights are taken" in said) == ("bf16" in name)
    # BF16_Optimizer lists the names of what a rank has, and the model file is the first rank's; others list none.
    assert ("there are those of 0, 1, 3, 4" in said) == (name in ("pp2_z0_w4_bf16", "pp2_z0_w2_fp32"))


# --- files that are not there, or not of this save ---


@pytest.mark.parametrize("view", ["fp32", "module"])
@pytest.mark.parametrize("name", ["pp2_z1_w2_bf16", "pp2_z0_w2_bf16", "v0_16_9_pp2_z1_w4_bf16"])
def test_missing_layers_are_named(name: str, view: str, copied: Callable[[str], Path]) -> None:
    tag = copied(name)
    for layer in (1, 4):
        (tag / f"layer_{layer:02d}-model_states.pt").unlink()
    error = refused(tag, view)
    assert error.code == "missing-layer"
    assert error.found == "2 files; not layer_01-model_states.pt, layer_04-model_states.pt"
    for path in tag.glob("layer*"):
        path.unlink()
    assert refused(tag, view).code == "missing-layer"


def test_a_layer_with_buffers_alone_is_missed_in_stage_0(copied: Callable[[str], Path]) -> None:
    tag = copied("pp2_z0_w2_fp32")
    (tag / "layer_03-model_states.pt").unlink()
    assert refused(tag).code == "missing-layer"


@pytest.mark.parametrize(("name", "model"), [("pp2_z1_w2_bf16", 1), ("v0_16_9_pp2_z1_w4_bf16", 0)])
def test_missing_stages_and_ranks_are_named(name: str, model: int, copied: Callable[[str], Path]) -> None:
    tag = copied(name)
    gone = next(tag.glob("*zero_pp_rank_0_mp_rank_01_optim_states.pt"))
    gone.unlink()
    error = refused(tag)
    assert error.code == "missing-rank"
    assert gone.name in error.found
    assert "--view module" in error.hint
    (tag / f"mp_rank_{model:02d}_model_states.pt").unlink()
    error = refused(tag)
    assert error.code == "missing-rank"
    assert f"mp_rank_{model:02d}_model_states.pt" in error.found


def test_stages_of_a_run_with_more_of_them(copied: Callable[[str], Path]) -> None:
    tag = copied("pp2_z1_w2_bf16")
    for path in sorted(tag.glob("*mp_rank_01*")):
        shutil.copy(path, tag / path.name.replace("mp_rank_01", "mp_rank_02"))
    error = refused(tag)
    assert (error.code, error.found) == ("mixed-runs", "files of mp_rank_02")


@pytest.mark.parametrize("names", ["layer_03*", "layer_0*", "*mp_rank_01*", "*optim*", "mp_rank_01*"])
def test_files_of_another_save_are_refused(names: str, copied: Callable[[str], Path]) -> None:
    tag = copied("pp2_two_saves_z1_w2_bf16")
    for path in (tag.parent / "global_step1").glob(names):
        shutil.copy(path, tag)
    assert {one.code for one in refused(tag).each()} == {"mixed-runs"}


def test_model_files_of_another_save_hold_no_weights(copied: Callable[[str], Path]) -> None:
    """Of the steps that they state nothing depends, and layers and masters agree: a warning, as for other runs."""
    tag = copied("pp2_two_saves_z1_w2_bf16")
    for path in (tag.parent / "global_step1").glob("mp_rank_*"):
        shutil.copy(path, tag)
    catalog = sm.inspect(tag)
    assert "1 in the model file; the weights of both agree" in " ".join(catalog.warnings)
    assert_is_truth(read_all(catalog), GOLDEN / "pipeline/pp2_two_saves_z1_w2_bf16")


def test_all_stages_are_looked_at_before_one_is_told_of(copied: Callable[[str], Path]) -> None:
    tag = copied("pp2_z1_w4_bf16")
    for path in tag.glob("*zero_pp_rank_1_*"):
        path.unlink()
    assert len(refused(tag).each()) == 2


@pytest.mark.parametrize("name", ["pp2_tied_z1_w2_bf16", "pp2_two_ties_z1_w2_bf16"])
def test_a_tied_layer_with_other_weights(name: str, copied: Callable[[str], Path]) -> None:
    tag = copied(name)
    rewrite(tag / "layer_00-model_states.pt", lambda root: {key: value + 1 for key, value in root.items()})
    error = refused(tag)
    assert error.code == "mixed-runs"
    assert error.where.endswith("layer_00-model_states.pt")


def test_tied_modules_of_one_shape_are_told_apart_by_their_weights(copied: Callable[[str], Path]) -> None:
    """Two layers in each other's place would make no difference to names and shapes."""
    tag = copied("pp2_two_ties_z1_w2_bf16")
    one, two = (tag / f"layer_{layer:02d}-model_states.pt" for layer in (0, 1))
    first, second = (torch.load(path, weights_only=False) for path in (one, two))
    torch.save(second, one)
    torch.save(first, two)
    assert_is_truth(read_all(sm.inspect(tag)), GOLDEN / "pipeline/pp2_two_ties_z1_w2_bf16")


def test_layer_files_under_each_others_names(copied: Callable[[str], Path]) -> None:
    tag = copied("pp2_z1_w2_bf16")
    shutil.copy(tag / "layer_01-model_states.pt", tag / "layer_03-model_states.pt")
    error = refused(tag)
    assert (error.code, error.found) == ("mixed-runs", "layer_01-model_states.pt")


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "another shape": ("zero-layout", lambda root: root | {"a.weight": root["a.weight"].t().contiguous()}),
    "a parameter less": ("zero-layout", lambda root: {key: root[key] for key in root if key != "a.bias"}),
    "a buffer less": ("zero-layout", lambda root: {key: root[key] for key in root if key != "counted"}),
    "other values": ("mixed-runs", lambda root: root | {"a.weight": root["a.weight"] + 1}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_layer_that_is_another_thing_than_the_model_file_says(what: str, copied: Callable[[str], Path]) -> None:
    code, change = WRONG[what]
    tag = copied("pp2_z1_w2_bf16")
    rewrite(tag / "layer_01-model_states.pt", change)
    assert refused(tag).code == code


def test_a_layer_file_that_is_cut_short(copied: Callable[[str], Path]) -> None:
    path = copied("pp2_z1_w2_bf16") / "layer_01-model_states.pt"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    assert refused(path.parent).code == "truncated-file"


def test_stage_1_without_names_is_refused(copied: Callable[[str], Path]) -> None:
    """The weights of the layer files are not what was asked for, and nobody would see it."""
    tag = copied("pp2_z1_w2_bf16")
    for path in tag.glob("mp_rank_*"):
        rewrite(path, lambda root: root | {"param_shapes": None})
    assert refused(tag).code == "zero-layout"
    assert sm.inspect(tag, view="module").entries


def test_buffers_of_tied_modules_that_no_layer_file_holds_are_absent(copied: Callable[[str], Path]) -> None:
    """Where all uses are functions of the module, none is written."""
    tag = copied("pp2_tied_z1_w2_bf16")
    for layer in (0, 6):
        (tag / f"layer_{layer:02d}-model_states.pt").unlink()
    rewrite(tag / "mp_rank_00_model_states.pt", lambda root: root | {"buffer_names": ["tied_modules.one.cache"]})
    catalog = sm.inspect(tag)
    assert catalog.absent == {"tied_modules.one.cache"}
    assert "1 buffers" in " ".join(catalog.warnings)
    assert "tied_modules.one.weight" in catalog


def test_a_name_of_thousands_of_digits_is_no_layer(copied: Callable[[str], Path]) -> None:
    tag = copied("pp2_z1_w2_bf16")
    rewrite(tag / "mp_rank_00_model_states.pt", lambda root: root | {"buffer_names": ["9" * 5000 + ".x"]})
    assert len(sm.inspect(tag).absent) == 1


def test_parameters_that_two_stages_list(copied: Callable[[str], Path]) -> None:
    tag = copied("pp2_z1_w2_bf16")
    first = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    rewrite(tag / "mp_rank_01_model_states.pt", lambda root: root | {"param_shapes": first})
    assert refused(tag, "module").what == "the model files of several pipeline stages list the same parameters"


def test_layers_that_are_cut_and_experts_are_refused_by_name(copied: Callable[[str], Path]) -> None:
    tag = copied("pp2_z1_w2_bf16")
    for path in tag.glob("layer_*"):
        path.rename(path.with_name(path.name.replace("-", "-model_00-", 1)))
    assert_is_truth(read_all(sm.inspect(tag)), GOLDEN / "pipeline/pp2_z1_w2_bf16")  # one part is the whole
    shutil.copy(tag / "layer_00-model_00-model_states.pt", tag / "layer_00-model_01-model_states.pt")
    assert "pipeline- and tensor-parallel" in refused(tag).what
    (tag / "layer_00-model_01-model_states.pt").unlink()
    degrees = {"pp_degree": 2, "tp_degree": 2}
    rewrite(tag / "mp_rank_00_model_states.pt", lambda root: root | {"checkpoint_parallel_dimensions": degrees})
    assert "pipeline- and tensor-parallel" in refused(tag).what
    rewrite(tag / "mp_rank_00_model_states.pt", lambda root: root | {"num_experts": [2]})
    assert "pipeline-parallel mixture-of-experts" in refused(tag).what
    rewrite(tag / "mp_rank_00_model_states.pt", lambda root: root | {"num_experts": []})
    shutil.copy(tag / "layer_00-model_00-model_states.pt", tag / "layer_0_expert_0_mp_rank_00_model_states.pt")
    assert "pipeline-parallel mixture-of-experts" in refused(tag).what


def test_the_command_line_names_the_layer(copied: Callable[[str], Path], tmp_path: Path) -> None:
    tag = copied("pp2_z1_w2_bf16")
    (tag / "layer_03-model_states.pt").unlink()
    done = shardmerge("convert", tag, tmp_path / "out", code=1)
    assert "[missing-layer]" in done.stderr
    assert "layer_03-model_states.pt" in done.stderr
    assert not (tmp_path / "out").exists()
