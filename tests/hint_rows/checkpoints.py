"""Checkpoints that are damaged, incomplete, of several models, or of a kind that is not read."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from tests.following import Call, Row, argument, by_hand
from tests.hint_rows.given import (
    CONVERT,
    LAYOUTS,
    ZERO,
    at_last,
    back,
    copied,
    made,
    mapped,
    removed,
    stored,
    told,
    truncated,
)
from tests.test_mistakes import GQA, REST
from tests.test_rank_sets import write_megatron

SHARDED = LAYOUTS / "phi3_to_llama_gqa/source"
META = LAYOUTS / "meta_llama2_tp2_gqa/source"
MEGATRON = LAYOUTS / "megatron_tp2_pp1_mha/source"
ONES = {"w": torch.ones(4)}


def run_shell(call: Call) -> None:
    """Runs the command that the hint has."""
    subprocess.run(call.hint.partition("there itself: ")[2].partition("; otherwise")[0], shell=True, check=True)


def linked_outside(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    shutil.move(folder / "config.json", folder.parent / "elsewhere")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere/config.json")


def two_shards(folder: Path, *, more: dict[str, torch.Tensor], index: bool = False) -> None:
    """A model of two shards without an index, and a tensor more in the second."""
    stored(folder / "model-00001-of-00002.safetensors", {"a": torch.ones(2)})
    stored(folder / "model-00002-of-00002.safetensors", {"b": torch.ones(2)} | more)


def megatron(call: Call, *, tensor: int, extra: int = 0) -> None:
    write_megatron(call.folder / "ck/iter_0000007", tensor, 1)
    for rank in range(tensor, tensor + extra):
        shutil.copytree(call.folder / "ck/iter_0000007/mp_rank_00", call.folder / f"ck/iter_0000007/mp_rank_{rank:02d}")


def other_names(call: Call) -> None:
    megatron(call, tensor=2)
    path = call.folder / "ck/iter_0000007/mp_rank_01/model_optim_rng.pt"
    (call.folder / "aside").mkdir()
    shutil.copy(path, call.folder / "aside")
    torch.save({"model": {"w": torch.ones(1)}}, path)


def models(call: Call, *folders: str) -> None:
    for folder in folders:
        stored(call.folder / "ck" / folder / "model.safetensors", ONES, model_type="x")


@contextlib.contextmanager
def no_hub() -> Iterator[None]:
    with mock.patch.dict(sys.modules, {"huggingface_hub": None}):
        yield


def moved_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    Path("aside").mkdir()
    shutil.copy(path, "aside")
    index = json.loads(path.read_text())
    index["weight_map"].pop(next(iter(index["weight_map"])))
    path.write_text(json.dumps(index))


def of_links(folder: Path) -> None:
    """As ``cp -r`` copies a snapshot of the hub cache, but for the small files."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
        path.symlink_to(f"../../blobs/{path.name}")


SHARDS = [
    Row(
        "a shard left behind",
        copied(SHARDED, without="*00002*"),
        "missing-shard",
        by_hand("download the rest", back()),
    ),
    Row(
        "a shard left behind, and no index",
        made(
            lambda call: (
                two_shards(call.folder / "ck", more={}),
                (call.folder / "aside").mkdir(),
                shutil.move("ck/model-00002-of-00002.safetensors", "aside"),
            )
        ),
        "missing-shard",
        by_hand("copy or download the rest", back()),
    ),
    Row(
        "a copy of links",
        copied(SHARDED, then=of_links),
        "missing-shard",
        by_hand(
            "remove this copy, and make one with what the links lead to",
            lambda call: (shutil.rmtree("ck"), shutil.copytree(SHARDED, "ck")),
        ),
    ),
    Row(
        "shards of two models",
        made(lambda call: two_shards(call.folder / "ck", more={"a": torch.ones(2)})),
        "duplicate-name",
        by_hand("keep those of one", lambda call: two_shards(call.folder / "ck", more={})),
    ),
    Row(
        "an index of another download",
        copied(SHARDED, then=moved_in_index),
        "lying-index",
        by_hand("fetch both again", back()),
    ),
    Row(
        "a file cut short",
        copied(LAYOUTS / "litgpt_llama_gqa/truth", then=truncated("model.safetensors")),
        "truncated-file",
        by_hand("copy or download the file again", back()),
    ),
    Row(
        "a torch file cut short",
        copied(LAYOUTS / "litgpt_llama_gqa/source", then=truncated("lit_model.pth")),
        "truncated-file",
        by_hand("copy or download the file again", back()),
    ),
    Row(
        "a rank of Meta's left behind",
        copied(META, "--use", "llama/meta-to-hf", without="*01.pth"),
        "missing-rank",
        by_hand("bring the files of all ranks", back()),
    ),
    Row(
        "ranks of two models",
        made(other_names, *CONVERT, "ck/iter_0000007", "out"),
        "mixed-ranks",
        by_hand(
            "fetch all ranks again", lambda call: shutil.copy("aside/model_optim_rng.pt", "ck/iter_0000007/mp_rank_01")
        ),
    ),
    Row(
        "rank folders of two runs",
        made(lambda call: megatron(call, tensor=2, extra=1), *CONVERT, "ck/iter_0000007", "out"),
        "mixed-ranks",
        by_hand("keep those of one", removed("ck/iter_0000007/mp_rank_02")),
    ),
    Row(
        "a tracker that names nothing",
        made(
            lambda call: (megatron(call, tensor=1), (Path("ck") / "latest_checkpointed_iteration.txt").write_text("9"))
        ),
        "missing-tag",
        told("pass the directory of the iteration itself", "ck", "ck/iter_0000007"),
    ),
]


KINDS = [
    Row(
        "a GGUF file",
        made(lambda call: ((call.folder / "ck").mkdir(), (call.folder / "ck/m.gguf").write_bytes(b"GGUF" * 16))),
        "kind-not-yet",
        told("the model that they were made from", "ck", "$gqa"),
    ),
    Row(
        "a file of Lightning",
        made(lambda call: ((call.folder / "ck").mkdir(), torch.save({"state_dict": ONES}, "ck/last.ckpt"))),
        "kind-not-yet",
        lambda call: call.change("ck", call.hint.rpartition(", ")[2]),
    ),
    Row(
        "several models and nothing to choose by",
        made(lambda call: models(call, "unet", "vae")),
        "several-checkpoints",
        at_last(),
    ),
    Row(
        "a run that holds checkpoints",
        made(lambda call: (models(call, "step_1", "step_2"), shutil.copy("ck/step_1/config.json", "ck"))),
        "nothing-to-convert",
        at_last(-1),
    ),
    Row(
        "a link out of the directory",
        copied(LAYOUTS / "litgpt_llama_gqa/truth", then=linked_outside),
        "link-outside",
        by_hand("put the file there itself", run_shell),
    ),
    Row(
        "a hub id that is not here",
        (*CONVERT, "org/name", "out"),
        "not-in-cache",
        argument("org/name", "$gqa", "pass a path"),
    ),
    Row(
        "a view of what is no run",
        (*CONVERT, "$gqa", "out", "--view", "module"),
        "no-effect",
        lambda call: (call.args.remove("--view"), call.args.remove("module")),
    ),
    Row(
        "a root of what has none",
        (*CONVERT, "$gqa", "out", "--root", "model"),
        "no-effect",
        lambda call: (call.args.remove("--root"), call.args.remove("model")),
    ),
    Row(
        "a misspelt path",
        GQA.replace("$gqa", "$world/linaer.safetensors") + REST,
        "missing-path",
        lambda call: call.change(f"{call.world['world']}/linaer.safetensors", call.ticked()[0]),
    ),
    Row(
        "a prefix that is not there",
        "sources: {m: {path: $gqa, strip: module.}}\noutput: out\ntensors:\n" + REST,
        "strip-matches-nothing",
        told("leave `strip` out", ", strip: module.", ""),
    ),
]


def gathered(call: Call, *, tag: bool) -> None:
    """A model that ZeRO-3 saved without gathering, its tag beside it or not."""
    folder = call.folder / "ck"
    shutil.copytree(ZERO / "llama_z3_w2_bf16/ckpt", folder)
    state = {
        "model.embed_tokens.weight": torch.empty(0),
        "model.norm.weight": torch.empty(0),
        "x.weight": torch.ones(2),
    }
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "latest").unlink()
    if not tag:
        (call.folder / "elsewhere").mkdir()
        shutil.move(folder / "global_step2", call.folder / "elsewhere")


PLACEHOLDERS = [
    Row(
        "placeholders beside their tag",
        made(lambda call: gathered(call, tag=True), *CONVERT, "ck/pytorch_model.bin", "out"),
        "placeholder",
        lambda call: call.change("ck/pytorch_model.bin", call.hint.partition("pass ")[2].split()[0]),
    ),
    Row(
        "placeholders whose tag lies elsewhere",
        made(lambda call: gathered(call, tag=False), *CONVERT, "ck/pytorch_model.bin", "out"),
        "placeholder",
        argument("ck/pytorch_model.bin", "elsewhere/global_step2", "pass that"),
    ),
    Row(
        "placeholders that nobody needs",
        mapped(
            "sources: {m: ck/pytorch_model.bin}\noutput: out\ntensors:\n" + REST,
            before=lambda call: gathered(call, tag=False),
        ),
        "placeholder",
        lambda call: call.add("drop:\n" + "\n".join(f"  {one}" for one in call.ticked() if one[:2] == "- ")),
    ),
    Row(
        "placeholders that nobody needs, beside their tag",
        mapped(
            "sources: {m: ck/pytorch_model.bin}\noutput: out\ntensors:\n" + REST,
            before=lambda call: gathered(call, tag=True),
        ),
        "placeholder",
        lambda call: call.change("ck/pytorch_model.bin", call.hint.partition("pass ")[2].split()[0]),
    ),
    Row(
        "placeholders that a target needs",
        mapped(
            "sources: {m: ck/pytorch_model.bin, c: $gqa}\noutput: out\ntarget: {name: hf/llama, text: c}\ntensors:\n"
            + REST
            + 'drop: ["c:{rest...}", "m:x.weight"]\n',
            before=lambda call: gathered(call, tag=True),
        ),
        "missing-tensor",
        lambda call: call.change("ck/pytorch_model.bin", call.hint.partition("pass ")[2].split()[0]),
        "drop-matches-nothing shape-mismatch",
    ),
    Row(
        "placeholders that a target needs, and no tag",
        mapped(
            "sources: {m: ck/pytorch_model.bin, c: $gqa}\noutput: out\ntarget: {name: hf/llama, text: c}\ntensors:\n"
            + REST
            + 'drop: ["c:{rest...}", "m:x.weight"]\n',
            before=lambda call: gathered(call, tag=False),
        ),
        "missing-tensor",
        told("the data are in the tag directory of the same save", "ck/pytorch_model.bin", "elsewhere/global_step2"),
        "drop-matches-nothing shape-mismatch",
    ),
]

ROWS = [*SHARDS, *KINDS, *PLACEHOLDERS]
