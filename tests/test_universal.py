"""Universal checkpoints of DeepSpeed: each tensor against the truth, every way in, what is wrong with their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardmerge as sm
from shardmerge.sources import torch_file
from tests.conftest import GOLDEN, read_all, same_values, shardmerge
from tests.counting import refusal
from tests.test_golden import assert_is_truth, truth_of

MIXED_UP = "round_robin_z2_w3_bf16"
CASES = [case for case in sorted((GOLDEN / "universal").iterdir()) if case.name != MIXED_UP]
PIPELINES = sorted((GOLDEN / "pipeline").glob("universal_*"))
BAG = GOLDEN / "universal/bag_z2_w3_bf16/ckpt"
BAG_3 = GOLDEN / "universal/bag_z3_w3_bf16/ckpt"


def tag_of(save_dir: Path) -> Path:
    return save_dir / (save_dir / "latest_universal").read_text()


def listed(tag: Path) -> list[str]:
    """The trained parameters, as the model files list them."""
    models = [torch.load(path, weights_only=False) for path in sorted(tag.glob("*_model_states.pt"))]
    return list(dict.fromkeys(name for model in models for group in model["param_shapes"] for name in group))


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    """A copy of a universal checkpoint of stage 2: its tag directory."""
    return tag_of(shutil.copytree(BAG, tmp_path / "ckpt"))


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Saves what a change makes of what torch reads, under the same name."""
    torch.save(change(torch.load(path, weights_only=False)), path)


def refused(path: Path) -> sm.ShardmergeError:
    return refusal(lambda: sm.inspect(path))[0]


def test_the_folder_has_all_stages_and_frozen_tied_and_buffers() -> None:
    cases = [json.loads((case / "case.json").read_text()) for case in CASES]
    assert {case["stage"] for case in cases} == {1, 2, 3}
    features = {feature for case in cases for feature in case["features"]}
    assert {"frozen parameters", "tied weights", "int64, bool and scalar buffers", "parameter_alignment"} <= features


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_tensor_has_the_bits_of_the_truth(case: Path, tmp_path: Path) -> None:
    catalog = sm.inspect(case / "ckpt")
    assert_is_truth(read_all(catalog), case)
    for name, tensor in truth_of(case).items():  # the conversion made floats of integers, and fp32 of what is frozen
        assert catalog[name].dtype.kind == ("float" if tensor.is_floating_point() else catalog[name].dtype.kind)
        assert tensor.is_floating_point() == (catalog[name].dtype.kind == "float"), name
    sm.convert(case / "ckpt", tmp_path / "out", options=sm.Options(sync=False))
    assert_is_truth(read_all(sm.inspect(tmp_path / "out")), case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_ds_to_universal_wrote_of_masters_is_read_as_torch_reads_it(case: Path) -> None:
    catalog, tag = sm.inspect(case / "ckpt"), tag_of(case / "ckpt")
    for name in listed(tag):
        saved = torch.load(tag / "zero" / name / "fp32.pt", weights_only=False)
        value = saved["param"] if isinstance(saved, dict) else saved
        assert catalog[name].dtype.name == "F32"
        assert same_values(read_all(catalog)[name], value.detach().reshape(catalog[name].shape).numpy())


@pytest.mark.parametrize("save_dir", [BAG, BAG_3], ids=["stage 2", "stage 3"])
def test_every_entry_point_gives_the_same_checkpoint(save_dir: Path) -> None:
    tag = tag_of(save_dir)
    expected = sm.inspect(tag)
    zero = tag / "zero"
    members = [*tag.glob("*_model_states.pt"), zero / "wide.weight/fp32.pt", zero / "wide.weight/exp_avg.pt"]
    for entry in (save_dir, *members, zero / "optimizer_state.pt", zero, zero / "wide.weight"):
        found = sm.inspect(entry)
        assert found.entries == expected.entries
        assert found.absent == expected.absent == frozenset()
    assert not any("exp_avg" in name or "step" in name for name in expected.names() if "buffers_" not in name)


def test_each_file_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(path: Path, known: torch_file.KnownPickles | None = None) -> torch_file.TorchFile:
        opened.append(str(path))
        return read(path, known)

    read = torch_file.read_torch_file
    monkeypatch.setattr("shardmerge.sources.deepspeed_parameters.read_torch_file", counted)
    catalog = sm.inspect(BAG)
    masters = [path for path in opened if path.endswith("fp32.pt")]
    assert len(masters) == len(set(opened)) // 2 == len(opened) // 2 == len(listed(tag_of(BAG)))
    assert set(masters) < {stamp.path for stamp in catalog.files}
    assert not any("exp_avg" in stamp.path for stamp in catalog.files)


@pytest.mark.parametrize("name", ["tied_z2_w2_fp16", "tied_z3_w2_bf16", "vocabulary_z2_w2_bf16"])
def test_a_tied_name_has_the_owners_master(name: str) -> None:
    """Where the conversion wrote it again, it is the 16-bit weight."""
    catalog = sm.inspect(GOLDEN / "universal" / name / "ckpt")
    assert catalog.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_padding_of_a_vocabulary_is_told_of() -> None:
    catalog = sm.inspect(GOLDEN / "universal/vocabulary_z2_w2_bf16/ckpt")
    assert catalog["lm_head.weight"].shape == (29, 8)
    assert "model.embed_tokens.weight, 29 of 33" in " ".join(catalog.warnings)


def test_the_16_bit_view_is_the_module_of_the_model_file(bag: Path) -> None:
    shutil.rmtree(bag / "zero" / "one.weight")  # it needs none of the masters
    found = read_all(sm.inspect(bag, view="module"))
    truth = truth_of(BAG.parent)
    assert set(found) == set(truth)
    trained = listed(bag)
    assert all(same_values(found[name], truth[name].bfloat16().double().numpy()) for name in trained)
    assert "[no-module-view]" in shardmerge("inspect", BAG_3, "--view", "module", code=1).stderr


# --- what the conversion does not carry over ---


def test_parameters_under_the_names_of_others_are_refused(tmp_path: Path) -> None:
    """``case.json`` lists which the conversion exchanged; a run of one rank has nothing to exchange."""
    case = GOLDEN / "universal" / MIXED_UP
    assert json.loads((case / "case.json").read_text())["universal_differs"]
    error = refused(case / "ckpt")
    assert error.code == "wrong-universal"
    assert "--view module" in error.hint
    truth = truth_of(case)
    module = read_all(sm.inspect(case / "ckpt", view="module"))
    assert all(same_values(module[name], truth[name].bfloat16().double().numpy()) for name in truth)
    alone = tag_of(shutil.copytree(case / "ckpt", tmp_path / "ckpt"))
    rewrite(alone / "mp_rank_00_model_states.pt", lambda root: root | {"dp_world_size": 1})
    assert refused(alone).code == "mixed-runs"  # these do not round to the module, whatever the file states


@pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.name)
def test_buffers_of_a_pipeline_are_named_as_absent(case: Path, tmp_path: Path) -> None:
    catalog = sm.inspect(case / "ckpt")
    truth = truth_of(case)
    found = read_all(catalog)
    lost = {name for name in truth if name.endswith((".counted", ".scale"))}
    assert catalog.absent == lost
    assert set(found) == set(truth) - lost
    assert all(same_values(found[name], truth[name].double().numpy()) for name in found)
    assert f"{len(lost)} buffers" in " ".join(catalog.warnings)
    assert "frozen parameters" in " ".join(catalog.warnings)
    done = shardmerge("convert", case / "ckpt", tmp_path / "out", code=1)
    assert "[placeholder]" in done.stderr
    assert not (tmp_path / "out").exists()
    assert "[no-module-view]" in shardmerge("inspect", case / "ckpt", "--view", "module", code=1).stderr


def test_a_stage_of_a_pipeline_that_is_missing_is_named(tmp_path: Path) -> None:
    tag = tag_of(shutil.copytree(PIPELINES[0] / "ckpt", tmp_path / "ckpt"))
    (tag / "mp_rank_01_model_states.pt").unlink()
    error = refused(tag)
    assert error.code == "missing-rank"
    assert "mp_rank_01_model_states.pt" in error.found


def test_a_step_of_another_save_of_a_pipeline(tmp_path: Path) -> None:
    tag = tag_of(shutil.copytree(PIPELINES[1] / "ckpt", tmp_path / "ckpt"))
    rewrite(tag / "zero/0.weight/step.pt", lambda step: step + 1)
    error = refused(tag)
    assert error.code == "mixed-runs"
    assert error.found == "3 steps in zero/0.weight/step.pt"
    assert "--view module" not in error.hint


# --- files that are not what they should be ---


def test_every_parameter_without_its_file_is_named(bag: Path) -> None:
    shutil.rmtree(bag / "zero/one.weight")
    (bag / "zero/wide.weight/fp32.pt").unlink()
    error = refused(bag)
    assert error.code == "missing-parameter"
    assert "2 of 8" in error.what
    assert "one.weight" in error.found
    assert "wide.weight" in error.found


def test_a_frozen_parameter_or_buffer_needs_no_file(bag: Path) -> None:
    """Older versions of the converter write none."""
    for path in (bag / "zero").iterdir():
        if path.is_dir() and path.name not in listed(bag):
            shutil.rmtree(path)
    assert_is_truth(read_all(sm.inspect(bag)), BAG.parent)


def test_a_parameter_that_no_model_file_lists(bag: Path) -> None:
    shutil.copytree(bag / "zero/one.weight", bag / "zero/two.weight")
    error = refused(bag)
    assert (error.code, error.found) == ("mixed-runs", "1: ['two.weight']")


def test_a_file_that_is_cut_short(bag: Path) -> None:
    path = bag / "zero/wide.weight/fp32.pt"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    assert refused(bag).code == "truncated-file"


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "another shape": ("zero-layout", lambda root: root | {"param": root["param"].reshape(-1)}),
    "other rows": ("zero-layout", lambda root: root | {"param": root["param"][:2].clone()}),
    "elements alone, too few": ("zero-layout", lambda root: root["param"].flatten()[:-1].clone()),
    "no floats": ("zero-layout", lambda root: root | {"param": root["param"].int()}),
    "no tensor": ("zero-layout", lambda root: root | {"param": None}),
    "nothing": ("zero-layout", lambda root: {}),
    "experts": ("zero-layout", lambda root: root | {"is_expert_param": True, "ep_num_experts": 4}),
    "other values": ("mixed-runs", lambda root: root | {"param": root["param"] + 1}),
    "not dense": ("zero-layout", lambda root: root | {"param": root["param"].transpose(0, 1)}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_another_thing_than_the_model_file_says(what: str, bag: Path) -> None:
    code, change = WRONG[what]
    rewrite(bag / "zero/matrix.weight/fp32.pt", change)
    error = refused(bag)
    assert error.code == code
    assert "matrix.weight" in f"{error.where} {error.found}"


def test_how_a_parameter_was_put_together_may_stand_beside_it(bag: Path) -> None:
    """The five keys that ``ds_to_universal`` writes (``deepspeed/checkpoint/constants.py``)."""
    more = {"cat_dim": 0, "vocab_tensor": False, "param_n_sub_params": 1, "sub_param_shape": None}
    rewrite(bag / "zero/matrix.weight/fp32.pt", lambda root: root | more)
    assert_is_truth(read_all(sm.inspect(bag)), BAG.parent)


def test_all_wrong_files_are_told_of_at_once(bag: Path) -> None:
    for name in ("matrix.weight", "wide.weight"):
        rewrite(bag / "zero" / name / "fp32.pt", WRONG["no tensor"][1])
    assert len(refused(bag).each()) == 2


def test_moments_in_the_place_of_a_master(bag: Path) -> None:
    folder = bag / "zero/wide.weight"
    shutil.copy(folder / "exp_avg.pt", folder / "fp32.pt")
    error = refused(bag)
    assert (error.code, error.found) == ("mixed-runs", "exp_avg.pt")


def test_a_parameter_of_another_save_is_known_by_its_step_and_weights(bag: Path) -> None:
    """The step alone changes nothing: an optimizer may have been begun anew. Together with one weight it does."""
    folder = bag / "zero/matrix.weight"
    rewrite(folder / "step.pt", lambda step: step + 1)
    assert "3 steps in zero/matrix.weight/step.pt, 2 in the model file" in " ".join(sm.inspect(bag).warnings)

    def one_other(root: dict[str, Any]) -> dict[str, Any]:
        root["param"].data[3, 4] += 1
        return root

    rewrite(folder / "fp32.pt", one_other)
    error = refused(bag)
    assert (error.code, error.found) == ("mixed-runs", "3 steps in zero/matrix.weight/step.pt")


def test_parameters_that_were_never_trained_are_told_of(bag: Path) -> None:
    """Those without a state of the optimizer are written from the 16-bit module, and without moments."""
    folder = bag / "zero/matrix.weight"
    module = torch.load(bag / "mp_rank_00_model_states.pt", weights_only=False)["module"]["matrix.weight"]
    for path in folder.iterdir():
        path.unlink()
    torch.save({"param": module.float()}, folder / "fp32.pt")
    assert "1 parameters have no masters, but 16-bit weights: ['matrix.weight']" in sm.inspect(bag).warnings


def test_a_rank_of_stage_3_that_is_missing_is_named(tmp_path: Path) -> None:
    """Frozen parameters lie in all of the model files."""
    tag = tag_of(shutil.copytree(BAG_3, tmp_path / "ckpt"))
    (tag / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    error = refused(tag)
    assert error.code == "missing-rank"
    assert "zero_pp_rank_1_mp_rank_00_model_states.pt" in error.found


def test_a_model_file_of_another_save(tmp_path: Path) -> None:
    tag = tag_of(shutil.copytree(BAG_3, tmp_path / "ckpt"))
    rewrite(tag / "zero_pp_rank_1_mp_rank_00_model_states.pt", lambda root: root | {"global_steps": 3})
    assert refused(tag).code == "mixed-runs"


def test_a_name_does_not_lead_out_of_the_checkpoint(bag: Path) -> None:
    torch.save({"param": torch.ones(2)}, shutil.copytree(bag / "zero/one.weight", bag.parent / "out") / "fp32.pt")

    def renamed(root: dict[str, Any]) -> dict[str, Any]:
        root["param_shapes"][0]["../../out"] = torch.Size([2])
        return root

    rewrite(bag / "mp_rank_00_model_states.pt", renamed)
    assert refused(bag).code == "missing-parameter"


def test_experts_and_cut_tensors_are_refused_by_name(bag: Path) -> None:
    path = bag / "mp_rank_00_model_states.pt"
    rewrite(path, lambda root: root | {"num_experts": [4]})
    assert "universal mixture-of-experts" in refused(bag).what
    rewrite(path, lambda root: root | {"num_experts": []})
    expert = shutil.copy(path, bag / "layer_0_expert_0_mp_rank_00_model_states.pt")
    assert "universal mixture-of-experts" in refused(bag).what
    expert.unlink()
    rewrite(path, lambda root: root | {"mp_world_size": 2, "checkpoint_parallel_dimensions": {}})
    assert "universal tensor-parallel" in refused(bag).what
    rewrite(path, lambda root: root | {"mp_world_size": 1})
    shutil.copy(path, bag / "mp_rank_01_model_states.pt")
    assert "universal tensor-parallel" in refused(bag).what


def test_the_truth_of_a_case_is_no_copy_of_what_is_read() -> None:
    """Of 16-bit aliases and integer buffers the conversion kept other values, so that taking them would be seen."""
    tag = tag_of(GOLDEN / "universal/tied_z2_w2_fp16/ckpt")
    alias = torch.load(tag / "zero/lm_head.weight/fp32.pt", weights_only=False)["param"]
    assert not alias.equal(load_file(tag.parent.parent / "truth.safetensors")["lm_head.weight"])
    steps = torch.load(tag_of(BAG) / "zero/buffers_.steps/fp32.pt", weights_only=False)["param"]
    assert int(steps) != int(load_file(BAG.parent / "truth.safetensors")["buffers_.steps"])
