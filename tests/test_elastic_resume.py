"""A run of ZeRO-3 on four ranks goes on elsewhere: FSDP2 of torch on two, DeepSpeed on three, as if nothing had been.

The run is DeepSpeed's own, in bfloat16 over fp32 masters, AdamW with two groups of parameters. Every rank sees the same
batch, so a mean over any number of them is the same gradient.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import shardmerge as sm
from tests import resume_torch
from tests.load_universal import KINDS
from tests.test_dcp_output import assert_same
from tests.test_universal_output import Values, converted, loader, run_deepspeed, run_each  # noqa: F401

pytestmark = pytest.mark.load


@dataclass
class Broken:
    """A run that was saved after its third step: its folder, and what it held then and after the fourth."""

    folder: Path
    unbroken: Values


@pytest.fixture(scope="module")
def run(loader: Path, tmp_path_factory: pytest.TempPathFactory) -> Broken:  # noqa: F811
    folder = tmp_path_factory.mktemp("elastic") / "ckpt"
    return Broken(folder, run_deepspeed(loader, "train", folder, 3, 4))


def moved(values: Values) -> None:
    """A step that changes nothing would show nothing."""
    for name, tensor in values["stepped"].items():
        assert (tensor - values["loaded"][name]).abs().max() > 1e-3, name


def test_torch_goes_on_with_two_ranks(run: Broken, tmp_path: Path) -> None:
    """The weights bit for bit, the loss too, and the weights after the step up to the rounding of fp32."""
    sm.convert(run.folder, tmp_path / "dcp", options=sm.Options(format="dcp", optimizer=True, sync=False))
    script = [sys.executable, "-m", "tests.resume_torch", tmp_path / "dcp", "2", tmp_path / "found.pt"]
    root = Path(resume_torch.__file__).parent.parent
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    found: Values = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_same(found["loaded"], run.unbroken["loaded"])
    assert {name: round(float(rate), 6) for name, rate in found["rates"].items()} == {"0": 0.01, "1": 0.01}
    assert_same(found["loss"], run.unbroken["loss"])
    moved(found)
    for name, tensor in run.unbroken["stepped"].items():
        assert torch.allclose(found["stepped"][name], tensor, rtol=1e-6, atol=1e-7), name


def test_deepspeed_goes_on_with_three_ranks(run: Broken, loader: Path, tmp_path: Path) -> None:  # noqa: F811
    """As after its own conversion, bit for bit, where DeepSpeed 0.19.8 is right: in the first group of parameters.

    At stage 3 it counts the steps of the second one twice. And from its own conversion it gives the settings of the
    first group to all: what has no decay then loses some of its weights. A trainer of ours keeps its settings.
    """
    sm.convert(run.folder, tmp_path / "ours", options=sm.Options(format="zero-universal", optimizer=True, sync=False))
    theirs = tmp_path / "theirs"
    converted(loader, run.folder, theirs / "universal")
    (theirs / "latest_universal").write_text("universal")
    found = run_each(loader, "load", 3, 3, tmp_path / "ours", theirs)
    for values in found:
        assert_same(values["loaded"], run.unbroken["loaded"])
        assert_same(values["loss"], run.unbroken["loss"])
        moved(values)
    ours, own = found
    for kind in KINDS:
        assert_same(ours[kind], own[kind])
    for name, tensor in run.unbroken["stepped"].items():
        if tensor.dim() > 1:
            assert torch.equal(ours["stepped"][name], own["stepped"][name]), name
            assert torch.allclose(ours["stepped"][name], tensor, rtol=0, atol=1e-4), name
        else:
            decay = 0.01 * 0.1 * ours["loaded"][name]
            assert torch.allclose(ours["stepped"][name], own["stepped"][name] + decay, rtol=0, atol=1e-6), name
