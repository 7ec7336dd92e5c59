"""Pipelines and universal checkpoints of DeepSpeed with files that are missing, of other saves, or changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.conftest import GOLDEN
from tests.following import Call, Row, by_hand, option
from tests.hint_rows.deepspeed import ONE_SAVE, from_the_hint
from tests.hint_rows.given import Given, back, copied, rewritten

PIPELINE = GOLDEN / "pipeline/pp2_z1_w2_bf16/ckpt"
TIED = GOLDEN / "pipeline/pp2_tied_z1_w2_bf16/ckpt"
OF_PIPELINE = GOLDEN / "pipeline/universal_pp2_z1_w4_bf16/ckpt"
UNIVERSAL = GOLDEN / "universal/bag_z2_w3_bf16/ckpt"
MIXED_UP = GOLDEN / "universal/round_robin_z2_w3_bf16/ckpt"
NODES = "gather the files of all nodes in one directory"
BY_MODULE = option("--view", "module", words="--view module")


def changed(case: Path, name: str, change: Callable[[Any], object], *args: str) -> Given:
    """A checkpoint with one file changed; the file as it was lies aside."""
    return copied(case, *args, then=rewritten(name, change))


def stage_more(folder: Path) -> None:
    for path in sorted(folder.rglob("*mp_rank_01*")):
        shutil.copy(path, path.with_name(path.name.replace("mp_rank_01", "mp_rank_02")))


def with_stranger(folder: Path) -> None:
    zero = next(folder.rglob("zero"))
    shutil.copytree(zero / "one.weight", zero / "another.weight")


def beside_its_source(folder: Path) -> None:
    """The checkpoint that a universal one was made of lies beside it, as the converter leaves it."""
    shutil.copytree(GOLDEN / "zero/round_robin_z2_w3_bf16/ckpt/global_step2", folder / "global_step2")


def without_parameter(folder: Path) -> None:
    Path("aside").mkdir()
    shutil.move(next(folder.rglob("one.weight")), "aside")


def parameter_back(call: Call) -> None:
    shutil.move("aside/one.weight", next(Path("ck").rglob("zero")))


PIPELINES = [
    Row(
        "a layer left behind",
        copied(PIPELINE, without="layer_03*"),
        "missing-layer",
        by_hand(NODES, back("ck/global_step2")),
    ),
    Row(
        "all layers left behind",
        copied(PIPELINE, without="layer_*"),
        "missing-layer",
        by_hand(NODES, back("ck/global_step2")),
    ),
    Row(
        "a stage left behind",
        copied(PIPELINE, without="mp_rank_01*"),
        "missing-rank",
        by_hand(NODES, back("ck/global_step2")),
    ),
    Row(
        "a stage's optimizer left behind, and nobody has it",
        copied(PIPELINE, without="*rank_01_optim*"),
        "missing-rank",
        BY_MODULE,
    ),
    Row(
        "stages of a run with more of them",
        copied(PIPELINE, then=stage_more),
        "mixed-runs",
        by_hand("move them elsewhere", lambda call: [path.unlink() for path in Path("ck").rglob("*mp_rank_02*")]),
    ),
    Row(
        "a stage that lists the layers of another",
        changed(
            PIPELINE,
            "mp_rank_01*",
            lambda root: root.update(param_shapes=[{"1.a.weight": torch.Size([5, 6])}]),
            "--view",
            "module",
        ),
        "mixed-runs",
        by_hand(ONE_SAVE, back()),
    ),
    Row(
        "a layer of another model",
        changed(PIPELINE, "layer_01*", lambda root: root.update({"a.weight": root["a.weight"].t().contiguous()})),
        "zero-layout",
        by_hand(ONE_SAVE, back()),
    ),
    Row(
        "a layer without one of its parameters",
        changed(PIPELINE, "layer_01*", lambda root: root.pop("a.bias")),
        "zero-layout",
        by_hand(ONE_SAVE, back()),
    ),
    Row(
        "a tied layer of another save",
        changed(TIED, "layer_00*", lambda root: root["weight"].add_(1)),
        "mixed-runs",
        by_hand(ONE_SAVE, back()),
    ),
]

UNIVERSALS = [
    Row(
        "a universal checkpoint that its conversion mixed up",
        copied(MIXED_UP, then=beside_its_source),
        "wrong-universal",
        from_the_hint("pass "),
    ),
    Row("a universal checkpoint that was mixed up, alone", copied(MIXED_UP), "wrong-universal", BY_MODULE),
    Row(
        "the module of a universal pipeline",
        copied(OF_PIPELINE, "--view", "module"),
        "no-module-view",
        lambda call: (
            call.args.remove("--view"),
            call.args.remove("module"),
            call.args.extend(["--dtype", "bfloat16"]),
        ),
        then="placeholder",
    ),
    Row(
        "a parameter left behind",
        copied(UNIVERSAL, then=without_parameter),
        "missing-parameter",
        by_hand("copy the checkpoint again", parameter_back),
    ),
    Row(
        "a parameter left behind, and nobody has it",
        copied(UNIVERSAL, then=without_parameter),
        "missing-parameter",
        BY_MODULE,
    ),
    Row(
        "a conversion over another one",
        copied(UNIVERSAL, then=with_stranger),
        "mixed-runs",
        by_hand(ONE_SAVE, lambda call: shutil.rmtree(next(Path("ck").rglob("another.weight")))),
    ),
    Row(
        "a parameter of another model",
        changed(UNIVERSAL, "matrix.weight/fp32.pt", lambda root: root.update(param=root["param"][:2].clone())),
        "zero-layout",
        by_hand(ONE_SAVE, back("ck/global_step2_universal/zero/matrix.weight")),
    ),
]

ROWS = [*PIPELINES, *UNIVERSALS]
