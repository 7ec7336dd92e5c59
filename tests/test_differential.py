"""Random files through two readers, a sample of ``python -m tests.differential``."""

from __future__ import annotations

import json

import pytest
import torch

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_constructors import _VALUES
from shardmerge.sources.torch_checkpoint import read_torch_checkpoint
from tests.differential import RESULTS, Counts, compare
from tests.differential_files import KINDS, Stateful

SAMPLE = {"torch": 300, "safetensors": 500}

pytestmark = pytest.mark.filterwarnings("ignore")  # of zipfile and torch, about files that are broken on purpose


@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_see_the_same_or_shardmerge_refuses(kind, tmp_path):
    counts = Counts()
    for number in range(SAMPLE[kind]):
        compare(kind, number, tmp_path, counts)
    assert counts.wrong == []
    assert counts.sound["equal"] > SAMPLE[kind] / 3
    assert counts.broken["equal"] > SAMPLE[kind] / 50
    assert counts.broken["refused by both"] > SAMPLE[kind] / 10


def test_the_results_have_nothing_wrong_in_them():
    rows = json.loads(RESULTS.read_text("utf-8"))["kinds"]
    assert set(rows) == set(KINDS)
    for row in rows.values():
        assert row["files"] == sum(row["sound"].values()) + sum(row["broken"].values())
        assert not row["wrong"]
        assert not row["crashed"]


def _is_changed(name: str, value: object, tensor: torch.Tensor) -> bool:
    """Whether a tensor holds something else once an attribute of it is set."""
    before = tensor.clone()
    try:
        setattr(tensor, name, value)
        return not torch.equal(torch.Tensor.clone(tensor).detach(), before)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it cannot be set, or not so
        return False


def test_attributes_that_are_a_tensors_values_are_known():
    found = {
        name
        for name in dir(torch.Tensor)
        for dtype in (torch.float32, torch.complex64)
        if not callable(getattr(torch.Tensor, name, None))
        and _is_changed(name, torch.full((4,), 7.0), torch.arange(4).to(dtype))
    }
    assert found == _VALUES


@pytest.mark.parametrize("name", sorted(_VALUES))
@pytest.mark.parametrize("parameter", [False, True])
def test_a_tensor_whose_values_are_replaced_by_an_attribute_is_refused(name, parameter, tmp_path):
    """torch sets the attributes of a loaded tensor one by one, and so may load other values than the storage has."""
    other = torch.arange(4.0) + 10
    torch.save({"w": Stateful(torch.arange(4.0), {name: other}, parameter), "v": other}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="an attribute of a tensor replaces its values"):
        read_torch_checkpoint(tmp_path / "model.pth")
    torch.save({"w": Stateful(torch.arange(4.0), {"tag": 1}, parameter), "v": other}, tmp_path / "model.pth")
    assert set(read_torch_checkpoint(tmp_path / "model.pth").names()) == {"v", "w"}
