"""What the files of a DeepSpeed run state against each other: each test here is the only one of its guard.

A checkpoint that DeepSpeed wrote, of which one file was changed to say something else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge as sm
from tests.conftest import GOLDEN
from tests.deepspeed_classes import deepspeed_classes

ZERO2, ZERO3 = (GOLDEN / f"zero/llama_z{stage}_w2_bf16" for stage in (2, 3))
PADDED, FROZEN = GOLDEN / "zero/alignment_z2_w3_bf16", GOLDEN / "zero/lora_z3_w2_bf16"
Root = dict[str, Any]


@pytest.fixture(autouse=True)
def classes() -> Iterator[None]:
    with deepspeed_classes():
        yield


def changed(case: Path, folder: Path, names: str, change: Callable[[Root], object]) -> Path:
    """A copy of a tag; the last of the files of a name is changed."""
    tag = shutil.copytree(next(case.rglob("*model_states.pt")).parent, folder / "tag")
    path = sorted(tag.glob(names))[-1]
    root = torch.load(path, weights_only=False)
    change(root)
    torch.save(root, path)
    return tag


def refused(folder: Path, **options: Any) -> sm.ShardmergeError:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(folder, **options)
    return caught.value.each()[0]


def flat_key(root: Root) -> str:
    return next(key for key in ("fp32_flat_groups", "single_partition_of_fp32_groups") if key in root)


def retyped(root: Root, dtype: torch.dtype) -> None:
    state = root["optimizer_state_dict"]
    state[flat_key(state)] = [flat.to(dtype) for flat in state[flat_key(state)]]


@pytest.mark.parametrize("case", [ZERO2, ZERO3], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_rank_with_partitions_of_another_type(case: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    error = refused(changed(case, tmp_path, "*optim_states.pt", lambda root: retyped(root, dtype)))
    assert (error.code, "element types" in error.what) == ("mixed-runs", True)


def test_a_rank_with_other_paddings(tmp_path: Path) -> None:
    def shift(root: Root) -> None:
        paddings = root["optimizer_state_dict"]["param_alignment_paddings"]
        paddings[0] = [one + 4 for one in paddings[0]]

    error = refused(changed(PADDED, tmp_path, "*optim_states.pt", shift))
    assert (error.code, "param_alignment_paddings" in error.what) == ("mixed-runs", True)


def test_a_frozen_fragment_of_another_type(tmp_path: Path) -> None:
    def retype(root: Root) -> None:
        held = root["frozen_param_fragments"]
        name = next(name for name in held if held[name].numel())
        held[name] = held[name].to(torch.float64)

    error = refused(changed(FROZEN, tmp_path, "*model_states.pt", retype))
    assert (error.code, "fragments" in error.what) == ("zero-layout", True)
