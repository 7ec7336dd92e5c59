"""Optimizers that are taken along from torch's distributed checkpoints and from DeepSpeed's universal ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardmerge as sm
from tests.conftest import GOLDEN
from tests.counting import refusal
from tests.test_dcp_output import as_saved, assert_same, one_process
from tests.test_optimizer_output import FORMS, OPTIONS, Run, read
from tests.test_universal_output import Stubs

UNIVERSAL = replace(OPTIONS, format="zero-universal")


def a_run(**settings: Any) -> Run:
    """Three steps of two groups, one of them with other settings."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.LayerNorm(3))
    inside = [one for one in model.parameters() if one.dim() > 1], [one for one in model.parameters() if one.dim() < 2]
    groups = [{"params": inside[0], "weight_decay": 0.1}, {"params": inside[1], "lr": 0.03, "betas": (0.8, 0.99)}]
    made = Run(model, torch.optim.AdamW(groups, lr=0.01, **settings))
    for _ in range(3):
        made.step()
    return made


def save(state: dict[str, Any], folder: Path) -> Path:
    with one_process():
        dcp.save(state, checkpoint_id=folder)
    return folder


def assert_same_optimizer(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for name, state in expected["state"].items():
        assert_same(found["state"][name], state)
    assert found["param_groups"] == expected["param_groups"]


# ---- torch's


@pytest.mark.parametrize("form", FORMS)
def test_what_torch_saved_in_either_form_is_saved_again(form: str, tmp_path: Path) -> None:
    """Groups that the flattened form has torn apart are put together by their settings."""
    run = a_run()
    source = save(run.state(flat=FORMS[form]), tmp_path / "source")
    sm.convert(source, tmp_path / "out", options=OPTIONS)
    found = as_saved(tmp_path / "out", tmp_path / "found.pt")
    assert_same(found["model"], run.state()["model"])
    assert_same_optimizer(found["optim"], run.state()["optim"])
    table = read(tmp_path / "out")[0]
    for flat in FORMS.values():
        theirs = read(save(run.state(flat=flat), tmp_path / f"theirs {flat}"))[0]
        assert theirs.state_dict_metadata.items() <= table.state_dict_metadata.items()


def test_a_real_run_of_two_ranks(tmp_path: Path) -> None:
    case = GOLDEN / "dcp" / "fsdp2_w2_bf16" / "ckpt"
    sm.convert(case, tmp_path / "out", options=OPTIONS)
    expected = as_saved(case, tmp_path / "expected.pt")
    found = as_saved(tmp_path / "out", tmp_path / "found.pt")
    assert_same_optimizer(found["optim"], expected["optim"])
    assert_same(found["model"], expected["model"])


def test_accelerate_keeps_it_in_a_directory_of_its_own(tmp_path: Path) -> None:
    run = a_run()
    state = run.state(beside="optimizer")
    save({"model": state["model"]}, tmp_path / "run" / "pytorch_model_fsdp_0")
    save({"optimizer": state["optimizer"]}, tmp_path / "run" / "optimizer_0")
    sm.convert(tmp_path / "run", tmp_path / "out", options=OPTIONS)
    assert_same_optimizer(as_saved(tmp_path / "out", tmp_path / "found.pt")["optim"], state["optimizer"])


def test_torchs_becomes_deepspeeds(tmp_path: Path) -> None:
    """In float32, as DeepSpeed's own are, whatever the run's moments were."""
    case = GOLDEN / "dcp" / "fsdp2_w2_bf16" / "ckpt"
    sm.convert(case, tmp_path / "out", options=UNIVERSAL)
    zero = tmp_path / "out" / "universal" / "zero"
    expected = as_saved(case, tmp_path / "expected.pt")["optim"]["state"]
    for kind in ("exp_avg", "exp_avg_sq"):
        found = {name: torch.load(zero / name / f"{kind}.pt", weights_only=True)["param"] for name in expected}
        assert_same(found, {name: state[kind].float() for name, state in expected.items()})
        assert any(tensor.any() for tensor in found.values())
    for name, state in expected.items():
        assert torch.load(zero / name / "step.pt", weights_only=True) == state["step"]


# ---- DeepSpeed's universal ones


@pytest.mark.parametrize("case", ["bag_z1_w2_bf16", "bag_z2_w3_bf16", "bag_z3_w3_bf16", "vocabulary_z2_w2_bf16"])
def test_what_ds_to_universal_wrote(case: str, tmp_path: Path) -> None:
    folder = GOLDEN / "universal" / case / "ckpt"
    tag = folder / (folder / "latest_universal").read_text()
    sm.convert(folder, tmp_path / "out", options=OPTIONS)
    found = as_saved(tmp_path / "out", tmp_path / "found.pt")
    assert len(found["optim"]["state"]) > 4
    for name, state in found["optim"]["state"].items():
        assert state["step"] == 2
        for kind in ("exp_avg", "exp_avg_sq"):
            saved = torch.load(tag / "zero" / name / f"{kind}.pt", weights_only=True)
            value = saved["param"] if isinstance(saved, dict) else saved
            assert torch.equal(state[kind], value.reshape(found["model"][name].shape)), name
    said = torch.load(tag / "zero" / "optimizer_state.pt", pickle_module=Stubs, weights_only=False)
    groups = said.get("param_groups") or said["optimizer_state_dict"]["param_groups"]
    model = torch.load(next(tag.glob("*_model_states.pt")), pickle_module=Stubs, weights_only=False)
    for group, expected in zip(found["optim"]["param_groups"], groups, strict=True):
        assert group == {**expected, "params": [name for n in expected["params"] for name in model["param_shapes"][n]]}


# ---- what is refused


def of_two(run: Run) -> dict[str, Any]:
    state = run.state()
    return {**state, "optimizer_1": state["optim"]}


def numbered(run: Run) -> dict[str, Any]:
    return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}


def without_a_step(run: Run) -> dict[str, Any]:
    state = run.state()
    del state["optim"]["state"]["0.weight"]["step"]
    return state


def without_a_moment(run: Run) -> dict[str, Any]:
    state = run.state()
    del state["optim"]["state"]["0.weight"]["exp_avg_sq"]
    return state


def without_a_name(run: Run) -> dict[str, Any]:
    state = run.state()
    state["optim"]["param_groups"][0]["params"].remove("0.weight")
    return state


REFUSED: dict[str, tuple[Callable[[Run], dict[str, Any]], str]] = {
    "several": (of_two, "several optimizers"),
    "by number": (numbered, "not called as those of the model"),
    "none": (lambda run: {"model": run.model.state_dict()}, "no tensors called exp_avg"),
    "a step that is missing": (without_a_step, "no step of"),
    "a moment that is missing": (without_a_moment, r"0\.weight"),
    "a group that lacks a weight": (without_a_name, "1 of those with moments are not among them"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_told_is_refused(what: str, tmp_path: Path) -> None:
    make, said = REFUSED[what]
    source = save(make(a_run()), tmp_path / "source")
    error = refusal(lambda: sm.convert(source, tmp_path / "out", options=OPTIONS))[0]
    assert error.code == "no-moments"
    with pytest.raises(sm.ShardmergeError, match=said):
        raise error


def test_a_setting_larger_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(a_run().state(), tmp_path / "source")
    monkeypatch.setattr("shardmerge.sources.dcp_moments._MOST_BYTES", 10)
    error = refusal(lambda: sm.convert(source, tmp_path / "out", options=OPTIONS))[0]
    assert error.code == "no-moments"
    assert re.search(r"is an object of [\d,]+ bytes", error.what)


@pytest.mark.parametrize("form", ["dcp", "zero-universal"])
def test_amsgrad_is_refused(form: str, tmp_path: Path) -> None:
    source = save(a_run(amsgrad=True).state(), tmp_path / "source")
    error = refusal(lambda: sm.convert(source, tmp_path / "out", options=replace(OPTIONS, format=form)))[0]
    assert error.code == "no-moments"
    assert "max_exp_avg_sq" in error.what


def test_a_view_of_moments_is_refused_where_there_are_none(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    error = refusal(lambda: sm.inspect(tmp_path / "pytorch_model.bin", view="exp_avg"))[0]
    assert error.code == "no-effect"
