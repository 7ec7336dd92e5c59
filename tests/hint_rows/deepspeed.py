"""DeepSpeed checkpoints with files that are missing, swapped, of other saves, or changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic import write_zero
from tests.following import Call, Follow, Row, by_hand, option
from tests.hint_rows.given import CONVERT, GOLDEN, ZERO, Given, at_last, back, copied, rewritten, told
from tests.test_claims import EDITS

Z2 = ZERO / "llama_z2_w2_bf16/ckpt"
Z3 = ZERO / "llama_z3_w2_bf16/ckpt"
MODEL, OPTIM_1 = "*model_states.pt", "*pp_rank_1_*optim_states.pt"
ONE_SAVE = "the files of one save into a directory of their own"


def claimed(what: str, case: str = "llama_z2_w2_bf16", *args: str) -> Given:
    """A checkpoint with one claim of its model file changed."""
    return copied(ZERO / case / "ckpt", *args, then=rewritten(MODEL, EDITS[what]))


def of_another(source: Path, names: str, *args: str, case: Path = Z2) -> Given:
    """A checkpoint with some files of another one in the place of its own, which lie aside."""

    def swap(folder: Path) -> None:
        tag = next(path.parent for path in folder.rglob(MODEL))
        aside = folder.parent / "aside"
        aside.mkdir()
        for path in sorted(source.rglob(names)):
            if (tag / path.name).exists():
                shutil.move(tag / path.name, aside)
            shutil.copy(path, tag)

    return copied(case, *args, then=swap)


def written(
    change: Callable[[Path], object] = str,
    edit: Callable[[dict[str, Any]], object] = str,
    **settings: Any,
) -> Given:
    """A checkpoint made here, whose second rank's optimizer file is changed; the file as it was lies aside."""

    def given(call: Call) -> Sequence[str]:
        shapes = {"a.weight": (7, 5), "b.weight": (3,)}
        tag = write_zero(call.folder / "ck", shapes, fill=True, **({"stage": 3, "world": 2} | settings))
        if edit is not str:
            rewritten(OPTIM_1, edit)(tag)
        change(tag)
        return [*CONVERT, "ck", "out"]

    return given


def swapped(folder: Path) -> None:
    one, two = sorted(folder.rglob("*optim_states.pt"))[:2]
    (folder.parent / "aside").mkdir()
    for path in (one, two):
        shutil.copy(path, folder.parent / "aside")
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def rank_twice(tag: Path) -> None:
    shutil.copy(
        tag / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    )


def a_rank_more(tag: Path) -> None:
    for path in sorted(tag.glob("*rank_1*")):
        shutil.copy(path, tag / path.name.replace("rank_1", "rank_2"))


def with_whole_model(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path / "pytorch_model.bin")


def from_the_hint(word: str) -> Follow:
    """Passes the path that stands after a word."""

    def follow(call: Call) -> None:
        path = call.hint.partition(word)[2].split()[0].rstrip(",;")
        assert Path(path).exists(), call.hint
        call.change("ck", path)

    return follow


BY_MODULE = option("--view", "module", words="--view module")

FILES = [
    Row(
        "a rank left behind",
        copied(Z2, without=OPTIM_1),
        "missing-rank",
        by_hand("gather the files", back("ck/global_step2")),
    ),
    Row("a rank left behind, and nobody has it", copied(Z2, without=OPTIM_1), "missing-rank", BY_MODULE),
    Row(
        "ranks of ZeRO-3 left behind, and a whole model beside",
        copied(Z3, without="*optim*", then=with_whole_model),
        "missing-rank",
        from_the_hint("or convert "),
    ),
    Row(
        "a tag that is damaged, and a whole model beside",
        copied(Z2, without=MODEL, then=with_whole_model),
        "missing-rank",
        from_the_hint("beside it: pass "),
    ),
    Row(
        "the model file left behind",
        copied(Z2, without=MODEL),
        "missing-rank",
        by_hand("rank 0 writes it", back("ck/global_step2")),
    ),
    Row("files swapped", copied(Z2, then=swapped), "mixed-runs", by_hand("give each its own name again", back())),
    Row(
        "a rank of another run",
        of_another(ZERO / "other_run_z2_w2_bf16/ckpt", OPTIM_1),
        "mixed-runs",
        by_hand(ONE_SAVE, back()),
    ),
    Row(
        "a model file of another run, and the optimizer's are lost",
        of_another(ZERO / "llama_z1_w2_bf16/ckpt", MODEL, case=Z2),
        "mixed-runs",
        BY_MODULE,
    ),
    Row(
        "files of a run with more ranks",
        written(a_rank_more),
        "mixed-runs",
        by_hand("move them elsewhere", lambda call: [path.unlink() for path in call.folder.rglob("*rank_2*")]),
        words="with more ranks",
    ),
    Row(
        "a rank with two files",
        written(rank_twice, stage=2),
        "mixed-runs",
        by_hand(
            "move the files of one of them elsewhere",
            lambda call: [path.unlink() for path in call.folder.rglob("zero_pp_rank_1_*optim*")],
        ),
    ),
    Row(
        "model files of a later save of ZeRO-3",
        of_another(ZERO / "two_saves_z3_w2_bf16/ckpt/global_step1", "*model_states.pt", case=Z3),
        "zero-layout",
        by_hand(ONE_SAVE, back()),
    ),
]

CLAIMS = [
    Row("a model file of another stage", claimed("stage 3"), "mixed-runs", by_hand(ONE_SAVE, back())),
    Row("a model file of stage 1", claimed("stage 1"), "mixed-runs", BY_MODULE),
    Row(
        "model files of a later step",
        claimed("a later step", "llama_z3_w2_bf16"),
        "mixed-runs",
        by_hand("the save was interrupted", back()),
    ),
    Row(
        "model files of a later step, and a whole model beside",
        copied(
            ZERO / "llama_z3_w2_bf16/ckpt",
            then=lambda folder: (rewritten(MODEL, EDITS["a later step"])(folder), with_whole_model(folder)),
        ),
        "mixed-runs",
        from_the_hint("or convert "),
    ),
    Row("a parameter less", claimed("a parameter less"), "zero-layout", by_hand(ONE_SAVE, back())),
    Row(
        "a parameter less, with alignment",
        claimed("a parameter less", "alignment_z2_w3_bf16"),
        "zero-layout",
        by_hand(ONE_SAVE, back()),
    ),
    Row(
        "a frozen parameter more",
        claimed("a frozen parameter more", "lora_z2_w2_bf16"),
        "zero-layout",
        by_hand("copy the checkpoint again", back()),
    ),
    Row(
        "more ranks than any run has",
        written(edit=lambda root: root["optimizer_state_dict"].update(partition_count=10**12)),
        "mixed-runs",
        by_hand(ONE_SAVE, back()),
    ),
    Row(
        "the module of a ZeRO-3 checkpoint",
        copied(Z3, "--view", "module"),
        "no-module-view",
        lambda call: (
            call.args.remove("--view"),
            call.args.remove("module"),
            call.args.extend(["--dtype", "bfloat16"]),
        ),
    ),
]

TAGS = [
    Row(
        "a tag that was removed",
        copied(ZERO / "two_tags_z2_w2_bf16/ckpt", then=lambda folder: (folder / "latest").write_text("gone")),
        "missing-tag",
        at_last(),
    ),
    Row(
        "the only tag removed",
        copied(Z2, then=lambda folder: shutil.move(folder / "global_step2", folder.parent / "global_step2")),
        "missing-tag",
        by_hand(
            "copy the tag directory here, and pass it itself",
            lambda call: (shutil.move("global_step2", "ck"), call.change("ck", "ck/global_step2")),
        ),
    ),
    Row(
        "a latest that holds no name",
        copied(Z2, then=lambda folder: (folder / "latest").write_text("0" * 4000)),
        "missing-tag",
        told("pass the checkpoint itself", "ck", "ck/global_step2"),
    ),
    Row(
        "a work_dir that names another checkpoint",
        copied(
            GOLDEN / "xtuner/frozen_z2/work_dirs",
            then=lambda folder: (folder / "last_checkpoint").write_text("iter_9.pth"),
        ),
        "missing-tag",
        told("pass the checkpoint itself", "ck", "ck/iter_2.pth"),
    ),
    Row(
        "tags without latest",
        copied(ZERO / "two_tags_z2_w2_bf16/ckpt", then=lambda folder: (folder / "latest").unlink()),
        "several-tags",
        at_last(),
    ),
]

ROWS = [*FILES, *CLAIMS, *TAGS]
