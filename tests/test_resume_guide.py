"""The guide to training elsewhere: its commands are run, and its code loads what they wrote."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import shardmerge as sm
from tests.conftest import GOLDEN, shardmerge

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "resume-elsewhere.md"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all commands of the page were run, from the first to the last."""
    shutil.copytree(GOLDEN / "zero" / "llama_z2_w2_bf16" / "ckpt", tmp_path / "checkpoint-500")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ shardmerge (.*)$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        shardmerge(*shlex.split(command))
    return tmp_path


def module_of(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Returns a module with parameters of these names and shapes, all of them ones."""
    root = nn.Module()
    for name, tensor in weights.items():
        *folders, last = name.split(".")
        place = root
        for folder in folders:
            if not hasattr(place, folder):
                place.add_module(folder, nn.Module())
            place = getattr(place, folder)
        place.register_parameter(last, nn.Parameter(torch.ones_like(tensor)))
    return root


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_code_loads_what_the_commands_wrote(made: Path) -> None:
    weights = {name: tensor.torch() for name, tensor in sm.open_checkpoint(made / "checkpoint-500").items()}
    model = module_of(weights)
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)[0]
    exec(code, {"model": model})
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_not_there_is_said_by_torch_and_may_be_left_out(made: Path) -> None:
    weight = sm.open_checkpoint(made / "checkpoint-500")["lm_head.weight"].torch()
    state = {"model": {"lm_head.weight": torch.zeros_like(weight), "not.there": torch.zeros(2)}}
    with pytest.raises(dcp.api.CheckpointException, match=r"model\.not\.there"):
        dcp.load(state, checkpoint_id=made / "out/dcp")
    dcp.load(state, checkpoint_id=made / "out/dcp", planner=DefaultLoadPlanner(allow_partial_load=True))
    assert torch.equal(state["model"]["lm_head.weight"], weight)
    assert not state["model"]["not.there"].any()


def test_the_masters_are_in_the_universal_checkpoint(made: Path) -> None:
    for name, tensor in sm.open_checkpoint(made / "checkpoint-500").items():
        found = torch.load(made / "out/universal/universal/zero" / name / "fp32.pt", weights_only=True)["param"]
        assert torch.equal(found, tensor.torch().float()), name
