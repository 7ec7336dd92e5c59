"""Distributed safetensors of which something is missing, or that are of two saves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.conftest import GOLDEN
from tests.following import Call, Row, by_hand
from tests.hint_rows.given import CONVERT, back, copied, made, told

SAVES = GOLDEN / "distributed_safetensors"
PARTS = SAVES / "fsdp2_parts_w3/ckpt"
WHOLE = SAVES / "fsdp2_w2/ckpt"
SHARD = "shard-{:05d}-model-00001-of-00001.safetensors"


def over(older: str) -> Callable[[Call], object]:
    """A save of two ranks over one of others."""

    def make(call: Call) -> None:
        shutil.copytree(SAVES / older / "ckpt", call.folder / "ck")
        shutil.copytree(WHOLE, call.folder / "ck", dirs_exist_ok=True)

    return make


def without_older(call: Call) -> None:
    for path in Path("ck").iterdir():
        if not (WHOLE / path.name).exists():
            path.unlink()


def without_prefix(call: Call) -> None:
    prefix = call.ticked()[0]
    for path in Path("ck").glob(f"{prefix}*"):
        path.rename(path.with_name(path.name.removeprefix(prefix)))


def renamed(call: Call) -> None:
    """The second shard alone, as a model's file."""
    (call.folder / "ck").mkdir()
    shutil.copy(WHOLE / SHARD.format(2), call.folder / "ck/model.safetensors")


def with_all(call: Call) -> None:
    assert SHARD.format(1) in call.hint
    shutil.copytree(WHOLE, call.folder / "all")
    call.change("ck", "all")


ROWS = [
    Row(
        "a rank's shards left behind",
        copied(PARTS, without="shard-00003*"),
        "missing-shard",
        by_hand("copy the files of all ranks", back()),
    ),
    Row(
        "one shard left behind",
        copied(PARTS, without="shard-00002-model-00001*"),
        "box-hole",
        by_hand("copy the files of all ranks", back()),
    ),
    Row(
        "the shards of one rank, which was the only one",
        copied(SAVES / "one_rank_w1/ckpt"),
        "lone-shard",
        by_hand("if the run had one process", without_prefix),
    ),
    Row("a shard under the name of a model", made(renamed), "lone-shard", by_hand("shards of all ranks", with_all)),
    Row(
        "a save of fewer ranks over another",
        made(over("hsdp_2x2")),
        "box-overlap",
        by_hand("keep those of one", without_older),
    ),
    Row(
        "a save of fewer files over another",
        made(over("fsdp2_parts_w3")),
        "mixed-shards",
        by_hand("keep those of one", without_older),
    ),
    Row(
        "a consolidated model with a name that no rank saved",
        made(lambda call: shutil.copytree(SAVES / "unsaved_name_w2/ckpt", call.folder / "ck"), *CONVERT, "ck", "out"),
        "damaged-header",
        told("the directory sharded/", "ck", "ck/sharded"),
    ),
]
