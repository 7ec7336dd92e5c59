"""The optimizer of a run in a distributed checkpoint: what torch itself saves of it, and steps on with."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import shardmerge as sm
from benchmarks.synthetic import write_zero
from shardmerge import api
from tests.conftest import GOLDEN, shardmerge
from tests.counting import refusal
from tests.deepspeed_classes import deepspeed_classes
from tests.scene import tree
from tests.test_dcp_output import assert_same, one_process
from tests.test_universal_output import moments_by_hand

OPTIONS = sm.Options(format="dcp", optimizer=True, sync=False)
FORMS = {"nested": False, "flattened": True}


@dataclass
class Run:
    """A model and its optimizer as torch itself holds them, with what a checkpoint says of both."""

    model: nn.Module
    optimizer: torch.optim.AdamW

    def state(self, root: str = "model", beside: str = "optim", *, flat: bool = False) -> dict[str, Any]:
        model, optimizer = get_state_dict(
            self.model, self.optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat)
        )
        return {**({root: model} if root else model), beside: optimizer}

    def step(self) -> dict[str, torch.Tensor]:
        """Returns the weights after a step with gradients that are the same for every run."""
        torch.manual_seed(5)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


def module_of(weights: Mapping[str, torch.Tensor], trained: Mapping[str, object]) -> nn.Module:
    made = nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        inner = made
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        if name in trained:
            inner.register_parameter(last, nn.Parameter(tensor.clone()))
        else:
            inner.register_buffer(last, tensor.clone())
    return made


def run_of(tag: Path, *, settings: bool = True) -> Run:
    """Puts together by hand, with torch alone, what a ZeRO checkpoint of stage 1 or 2 says."""
    moments = {kind: moments_by_hand(tag, kind) for kind in ("exp_avg", "exp_avg_sq")}
    catalog = sm.open_checkpoint(tag)
    model = module_of({name: tensor.torch() for name, tensor in catalog.items()}, moments["exp_avg"])
    named = dict(model.named_parameters())
    with deepspeed_classes():
        optim = torch.load(min(tag.glob("*_optim_states.pt")), weights_only=False)["optimizer_state_dict"]
        states = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=False)
    base, groups = optim["base_optimizer_state"], []
    for number, group in enumerate(base["param_groups"]):
        told = {key: value for key, value in group.items() if key != "params"} if settings else {}
        groups.append({**told, "params": [named[name] for name in states["param_shapes"][number]]})
    optimizer = torch.optim.AdamW(groups)
    for number, shapes in enumerate(states["param_shapes"] if settings else []):
        for name in shapes:
            step = base["state"][number]["step"].clone()
            optimizer.state[named[name]] = {"step": step, **{kind: of[name].clone() for kind, of in moments.items()}}
    return Run(model, optimizer)


def tag_of(case: str) -> Path:
    (tag,) = (folder for folder in (GOLDEN / "zero" / case / "ckpt").iterdir() if folder.is_dir())
    return tag


def read(folder: Path) -> tuple[Metadata, dict[str, object]]:
    """Returns the table of a checkpoint, and every object in it, as torch reads them."""
    table: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    found = {}
    for index, place in table.storage_data.items():
        if isinstance(table.state_dict_metadata[index.fqn], BytesStorageMetadata):
            raw = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
            found[index.fqn] = torch.load(io.BytesIO(raw), weights_only=True)
    return table, found


# ---- what torch writes, and what it makes of it


@pytest.mark.parametrize("case", ["bag_z2_w3_bf16", "bf16_optimizer_z1_w2_bf16", "v0_9_5_bag_z1_w2_bf16"])
def test_it_is_what_torch_saves_in_both_of_its_forms(case: str, tmp_path: Path) -> None:
    """All names, types, shapes, paths and objects: groups with other rates and decay, frozen weights, buffers."""
    tag = tag_of(case)
    sm.convert(tag, tmp_path / "ours", options=OPTIONS)
    table, objects = read(tmp_path / "ours")
    run = run_of(tag)
    names, paths, values = {}, {}, {}
    for form, flat in FORMS.items():
        with one_process():
            dcp.save(run.state(flat=flat), checkpoint_id=tmp_path / form)
        theirs, found = read(tmp_path / form)
        names |= theirs.state_dict_metadata
        paths = {**theirs.planner_data, **paths}  # of names that both forms have, ours leads as the nested one does
        values |= found
    assert table.state_dict_metadata == names
    assert table.planner_data == paths
    assert repr(sorted(objects.items())) == repr(sorted(values.items()))  # types too: True is not 1
    assert len(objects) > 20
    sm.verify(tmp_path / "ours")


@pytest.mark.parametrize("form", FORMS)
def test_torch_steps_on_as_the_run_would(form: str, tmp_path: Path) -> None:
    """Rates, decay and moments of three groups are the run's, bit for bit, and not the trainer's own."""
    tag = tag_of("bag_z2_w3_bf16")
    sm.convert(tag, tmp_path / "out", options=OPTIONS)
    there, fresh = run_of(tag), run_of(tag, settings=False)
    for tensor in fresh.model.state_dict().values():
        tensor.zero_()
    state = fresh.state(flat=FORMS[form])
    with one_process():
        dcp.load(state, checkpoint_id=tmp_path / "out")
    options = StateDictOptions(flatten_optimizer_state_dict=FORMS[form])
    set_state_dict(
        fresh.model, fresh.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"], options=options
    )
    strip = [{key: value for key, value in group.items() if key != "params"} for group in there.optimizer.param_groups]
    for group, expected in zip(fresh.optimizer.param_groups, strip, strict=True):
        assert {key: value for key, value in group.items() if key != "params"} == expected
    before = {name: tensor.clone() for name, tensor in there.model.state_dict().items()}
    expected = there.step()
    assert_same(fresh.step(), expected)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(("root", "model", "beside"), [("app.m", "m", "optim"), ("", "", "optimizer")])
def test_the_optimizer_is_beside_the_model(root: str, model: str, beside: str, tmp_path: Path) -> None:
    """At the top, as torchtitan has it, it is `optimizer`."""
    tag = tag_of("bag_z2_w3_bf16")
    shardmerge("convert", tag, tmp_path / "out", "--format", "dcp", "--with-optimizer", "--dcp-root", root)
    inner = run_of(tag).state(model, beside)
    with one_process():
        dcp.save({"app": inner} if root else inner, checkpoint_id=tmp_path / "theirs")
    table, theirs = read(tmp_path / "out")[0], read(tmp_path / "theirs")[0]
    assert theirs.state_dict_metadata.items() <= table.state_dict_metadata.items()
    assert theirs.planner_data.items() <= table.planner_data.items()


def test_it_is_read_again_without_its_optimizer(tmp_path: Path) -> None:
    tag = tag_of("bag_z2_w3_bf16")
    sm.convert(tag, tmp_path / "out", options=OPTIONS)
    sm.convert(tmp_path / "out", tmp_path / "again", options=sm.Options(sync=False))
    expected = {name: tensor.torch() for name, tensor in sm.open_checkpoint(tag).items()}
    found = {name: tensor.torch() for name, tensor in sm.open_checkpoint(tmp_path / "again").items()}
    assert_same(found, expected)


def test_the_same_bytes_for_any_workers_and_files_of_any_size(tmp_path: Path) -> None:
    tag = tag_of("bag_z2_w3_bf16")
    found = []
    for number, workers in enumerate((1, 4)):
        options = sm.Options(format="dcp", optimizer=True, shard_size=700, workers=workers, sync=False)
        sm.convert(tag, tmp_path / str(number), options=options)
        found.append(tree(tmp_path / str(number)))
    assert found[0] == found[1]
    assert sum(name.endswith(".distcp") for name in found[0]) > 4


# ---- what cannot be told


def edited(folder: Path, edit: Callable[[dict[str, Any]], object], decay: float = 0.1) -> Path:
    """Two ranks of stage 3, all optimizer files changed alike."""
    tag = write_zero(folder, {"a.weight": (7, 5), "b.weight": (3,)}, stage=3, world=2, fill=True)
    for path in tag.glob("*_optim_states.pt"):
        root = torch.load(path, weights_only=True)
        base = root["optimizer_state_dict"]["optimizer_state_dict"]
        settings = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay}
        base["param_groups"] = [{**settings, "params": [0]}]
        edit(root)
        torch.save(root, path)
    return tag


def group_of(root: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = root["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"][0]
    return group


UNTOLD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no rate": (lambda root: group_of(root).pop("lr"), r"parameter group 0 does not say \['lr'\]"),
    "no decay": (lambda root: group_of(root).pop("weight_decay"), "weight_decay"),
    "a rate that is a tensor": (lambda root: group_of(root).update(lr=torch.tensor(0.1)), "lr of parameter group 0"),
    "another group's weights": (lambda root: group_of(root).update(params=[1]), "each of 1 flat groups once"),
    "no weights": (lambda root: group_of(root).pop("params"), "each of 1 flat groups once"),
    "no bias correction": (lambda root: group_of(root).update(bias_correction=False), "no bias correction"),
}


@pytest.mark.parametrize("what", UNTOLD)
def test_what_an_optimizer_does_not_say_is_refused(what: str, tmp_path: Path) -> None:
    edit, said = UNTOLD[what]
    tag = edited(tmp_path / "run", edit)
    error = refusal(lambda: sm.convert(tag, tmp_path / "out", options=OPTIONS))[0]
    assert error.code == "no-moments"
    assert re.search(said, str(error))
    assert not (tmp_path / "out").exists()


DECOUPLED: dict[str, tuple[Callable[[dict[str, Any]], object], bool | None]] = {
    "torch says it": (lambda root: group_of(root).update(decoupled_weight_decay=False), False),
    "DeepSpeed's AdamW": (lambda root: root.update(ds_config={"optimizer": {"type": "AdamW"}}), True),
    "DeepSpeed's Adam is AdamW": (lambda root: root.update(ds_config={"optimizer": {"type": "Adam"}}), True),
    "but for this": (
        lambda root: root.update(ds_config={"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}),
        False,
    ),
    "nobody": (lambda root: None, None),
}


@pytest.mark.parametrize("what", DECOUPLED)
def test_adam_or_adamw_is_told_and_never_guessed(what: str, tmp_path: Path) -> None:
    """Where nothing says it, torch itself names the key that is not there, and loads the rest."""
    edit, expected = DECOUPLED[what]
    tag = edited(tmp_path / "run", edit)
    warnings = api.prepare_conversion(tag, options=OPTIONS).plan.warnings
    sm.convert(tag, tmp_path / "out", options=OPTIONS)
    objects = read(tmp_path / "out")[1]
    key = "optim.param_groups.0.decoupled_weight_decay"
    assert objects.get(key) is expected
    assert ("does not say decoupled_weight_decay" in " ".join(warnings)) == (expected is None)
    assert objects["optim.param_groups.0.params"] == ["a.weight", "b.weight"]
    if expected is None:
        weights = {"a.weight": torch.zeros(7, 5), "b.weight": torch.zeros(3)}
        made = Run(made := module_of(weights, weights), torch.optim.AdamW(made.parameters()))
        with one_process(), pytest.raises(CheckpointException, match=key):
            dcp.load(made.state(), checkpoint_id=tmp_path / "out")
        state = made.state()
        with one_process():
            planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
            dcp.load(state, checkpoint_id=tmp_path / "out", planner=planner)
        assert state["optim"]["param_groups"][0]["lr"] == 0.01


def test_two_things_of_one_name_are_refused(tmp_path: Path) -> None:
    """A weight that is called 0 has a rate of its own in one form, where the other has that of group 0."""
    tag = write_zero(tmp_path / "run", {"0": (7, 5)}, stage=3, world=2, fill=True)
    for path in tag.glob("*_optim_states.pt"):
        root = torch.load(path, weights_only=True)
        base = root["optimizer_state_dict"]["optimizer_state_dict"]
        base["param_groups"] = [{"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "params": [0]}]
        torch.save(root, path)
    errors = refusal(lambda: sm.convert(tag, tmp_path / "out", options=OPTIONS))[0].each()
    assert {error.code for error in errors} == {"unusable-name"}
    assert "optim.param_groups.0.lr" in str(errors[0].found)


def test_moments_are_not_held_against_the_config_of_the_model() -> None:
    """A Trainer's checkpoint has config.json beside its tag."""
    case = GOLDEN / "hf_trainer" / "checkpoint-2"
    plan = api.prepare_conversion(case, options=OPTIONS).plan
    assert any(tensor.name.startswith("exp_avg:") for tensor in plan.tensors())
    assert any(side.name == "config.json" for side in plan.side_files)
    assert not [text for text in plan.warnings if "not of the model" in text]
