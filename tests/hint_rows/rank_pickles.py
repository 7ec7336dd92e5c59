"""One pickle a rank: ranks that are missing, of two runs, or of what is not read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import Partial

from tests.conftest import GOLDEN
from tests.following import Call, Row, by_hand
from tests.hint_rows.given import CONVERT, at_last, back, copied, made, removed, rewritten

RANKS = GOLDEN / "ranks"
FSDP2, HSDP, BAG = (RANKS / name / "actor" for name in ("fsdp2_w2_bf16", "hsdp_2x2_bf16", "fsdp2_bag_w3_fp32"))
FILE = "model_world_size_2_rank_{}.pt"


def saved_whole(case: Path) -> Callable[[Call], object]:
    """Saves what the run gathers, in the place of its ranks."""

    def do(call: Call) -> None:
        removed("ck")(call)
        (call.folder / "ck").mkdir()
        torch.save(load_file(case.parent / "truth.safetensors"), call.folder / "ck/model.pt")

    return do


def local(call: Call) -> None:
    shutil.copytree(RANKS / "local_w2_fp32/actor", call.folder / "ck")


def alone(call: Call) -> None:
    """The file of one rank under a name that says nothing."""
    shutil.copy(FSDP2 / FILE.format(0), call.folder / "ck.pt")


def renamed(call: Call) -> None:
    (call.folder / "ranks").mkdir()
    for rank in range(2):
        shutil.copy(FSDP2 / FILE.format(rank), call.folder / "ranks")
    call.change("ck.pt", "ranks")


def partial(state: dict[str, Any]) -> None:
    """Gives a tensor the placement of sums that are still to be made."""
    spec = state["model.norm.weight"]._spec
    object.__setattr__(spec, "placements", (Partial(),))
    object.__setattr__(spec, "shard_order", None)


def own_experts(folder: Path) -> None:
    for rank, path in enumerate(sorted(folder.glob("*.pt"))):
        state = torch.load(path, weights_only=False)
        torch.save({**state, "experts.weight": torch.full((4, 3), float(rank))}, path)


def of_another_run(folder: Path) -> None:
    shutil.copy(folder / FILE.format(0), folder / FILE.format(2))


def not_sharded(folder: Path) -> None:
    """A rank that has a tensor whole of which the others have parts."""
    Path("aside").mkdir()
    path = folder / FILE.format(1)
    shutil.copy(path, "aside")
    state = torch.load(path, weights_only=False)
    torch.save({**state, "model.norm.weight": torch.ones(8)}, path)


def two_worlds(folder: Path) -> None:
    (folder / "fsdp_config.json").unlink()
    shutil.copy(HSDP / "model_world_size_4_rank_0.pt", folder)


ROWS = [
    Row(
        "a rank of FSDP left behind",
        copied(FSDP2, without=FILE.format(1)),
        "missing-rank",
        by_hand("bring the files of all ranks", back()),
    ),
    Row(
        "a rank of FSDP too many",
        copied(FSDP2, then=of_another_run),
        "mixed-ranks",
        by_hand("keep those of one", removed(f"ck/{FILE.format(2)}")),
    ),
    Row(
        "a rank that has a tensor whole",
        copied(FSDP2, then=not_sharded),
        "mixed-ranks",
        by_hand("keep those of one", back()),
    ),
    Row(
        "ranks of two worlds in one directory",
        copied(FSDP2, then=two_worlds),
        "several-files",
        at_last(),
    ),
    Row(
        "experts that every rank has of its own",
        copied(BAG, then=own_experts),
        "ranks-differ",
        by_hand("StateDictOptions(full_state_dict=True)", saved_whole(BAG)),
    ),
    Row(
        "sums that are still to be made",
        copied(FSDP2, then=rewritten("*.pt", partial)),
        "unsupported-tensor",
        by_hand("StateDictOptions(full_state_dict=True)", saved_whole(FSDP2)),
    ),
    Row(
        "a LOCAL_STATE_DICT of FSDP",
        made(local),
        "flat-parameters",
        by_hand("StateDictType.FULL_STATE_DICT", saved_whole(FSDP2)),
    ),
    Row(
        "one rank under another name",
        made(alone, *CONVERT, "ck.pt", "out"),
        "one-rank",
        by_hand("named model_world_size_W_rank_R.pt", renamed),
    ),
]
