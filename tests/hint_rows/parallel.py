"""DeepSpeed checkpoints of experts and tensor parallel ranks with files that are missing, mixed, or changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import GOLDEN
from tests.deepspeed_classes import deepspeed_classes
from tests.following import Call, Row, by_hand, option
from tests.hint_rows.given import Given, back, copied, rewritten

MOE = GOLDEN / "parallel/moe_z2_ep2_w2_bf16/ckpt"
OLD_MOE = GOLDEN / "parallel/v0_16_9_moe_z2_ep2_w4_bf16/ckpt"
TENSOR = GOLDEN / "parallel/autotp_z1_tp2_w2_bf16/ckpt"
MODEL, EXPERT, SECOND = "mp_rank_00_model_states.pt", "layer_0_expert_1_*", "mp_rank_01_model_states.pt"
OPTIMS = "*zero_pp*optim_states.pt"
TAG = "ck/global_step2"
BY_MODULE = option("--view", "module", words="--view module")


def rewrite(case: Path, names: str, change: Callable[[dict[str, Any]], object]) -> Given:
    """A checkpoint with a file changed; as it was it lies aside."""
    return copied(case, then=rewritten(names, change))


def without_order(folder: Path) -> None:
    """An optimizer of the time before 0.17 that took the gradients in turn, and nothing that names its partitions."""

    def change(root: dict[str, Any]) -> None:
        root["ds_config"]["zero_optimization"]["round_robin_gradients"] = True

    with deepspeed_classes():
        rewritten(OPTIMS, change)(folder)


def other_run_beside(folder: Path) -> None:
    for path in sorted(folder.rglob("*mp_rank_01*")):
        shutil.copy(path, path.with_name(path.name.replace("mp_rank_01", "mp_rank_02")))


def third_gone(call: Call) -> None:
    for path in call.folder.rglob("*mp_rank_02*"):
        path.unlink()


ROWS = [
    Row(
        "an expert left behind",
        copied(MOE, without=EXPERT),
        "missing-rank",
        by_hand("gather the files", back(TAG)),
        words="its own experts",
    ),
    Row(
        "experts of a run with more of them",
        rewrite(MOE, MODEL, lambda root: root.update(num_experts=[4, 2])),
        "mixed-runs",
        by_hand("copy the files of one save", back()),
        words="two runs are mixed",
    ),
    Row(
        "an expert of another form",
        rewrite(MOE, EXPERT, lambda root: root.popitem()),
        "mixed-runs",
        by_hand("copy the save anew", back()),
        words="renamed, swapped",
    ),
    Row(
        "the partitions of an old mixture left behind",
        copied(OLD_MOE, without=OPTIMS),
        "missing-rank",
        BY_MODULE,
        words="its own ranks",
    ),
    Row(
        "partitions whose order nobody wrote down",
        copied(OLD_MOE, then=without_order),
        "zero-layout",
        BY_MODULE,
    ),
    Row(
        "a tensor parallel rank left behind",
        copied(TENSOR, without=SECOND),
        "missing-rank",
        by_hand("gather the files", back(TAG)),
        words="its own ranks",
    ),
    Row(
        "a tensor parallel rank too many",
        copied(TENSOR, then=other_run_beside),
        "mixed-runs",
        by_hand("move them elsewhere", third_gone),
        words="another run",
    ),
    Row(
        "a tensor parallel rank of another save",
        rewrite(TENSOR, SECOND, lambda root: root.update(skipped_steps=1, global_steps=3)),
        "mixed-runs",
        by_hand("copy the files of one save", back()),
        words="copy the files of one save",
    ),
    Row(
        "a tensor parallel rank with other ties",
        rewrite(
            GOLDEN / "parallel/autotp_tied_z1_tp2_w2_bf16/ckpt",
            SECOND,
            lambda root: (
                root["shared_params"].clear(),
                root["module"].update({"lm_head.weight": root["module"]["lm_head.weight"].clone()}),
            ),
        ),
        "mixed-ranks",
        by_hand("copy the files of one save", back()),
        words="copy the files of one save",
    ),
    Row(
        "masters without names in one rank",
        rewrite(
            GOLDEN / "parallel/autotp_z0_tp2_w2_bf16/ckpt",
            SECOND,
            lambda root: root["optimizer"]["fp32_groups"][0].append(root["optimizer"]["fp32_groups"][0][0] + 1),
        ),
        "mixed-ranks",
        BY_MODULE,
        words="have no names",
    ),
    Row(
        "buffers that are not the same in all ranks",
        rewrite(
            GOLDEN / "parallel/autotp_fused_z1_tp2_w4_bf16/ckpt",
            SECOND,
            lambda root: root["module"]["scale"].add_(1),
        ),
        "mixed-ranks",
        by_hand("copy the files of one save", back()),
        words="drift apart",
    ),
]
