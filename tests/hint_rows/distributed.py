"""Checkpoints of torch's distributed checkpoint that are not whole, not of one save, or of several models."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from tests.conftest import GOLDEN
from tests.following import Call, Follow, Row, by_hand
from tests.hint_rows.given import CONVERT, Given, made

CASE = GOLDEN / "dcp" / "fsdp2_w2_bf16"
RANKS = GOLDEN / "dcp" / "no_collectives_w2_bf16"
NAME = "model.model.embed_tokens.weight"


def broken(change: Callable[[Path], object], case: Path = CASE) -> Given:
    """A copy of a checkpoint, as ``ck``, and something done to it; the original stays in reach."""

    def make(call: Call) -> None:
        for name in ("ck", "original"):
            shutil.copytree(case / "ckpt", call.folder / name)
        change(call.folder / "ck")

    return made(make)


def whole(call: Call) -> None:
    shutil.copytree(call.folder / "original", call.folder / "ck", dirs_exist_ok=True)


def again(words: str) -> Follow:
    """Copies the directory again, as the hint says in these words."""
    return by_hand(
        words, lambda call: shutil.copytree(call.folder / "original", call.folder / "ck", dirs_exist_ok=True)
    )


def said(edit: Callable[[Metadata], object], name: str = ".metadata") -> Callable[[Path], object]:
    """Has torch's own classes say something else."""

    def change(folder: Path) -> None:
        metadata = pickle.loads((folder / name).read_bytes())
        edit(metadata)
        (folder / name).write_bytes(pickle.dumps(metadata))

    return change


def other_type(metadata: Metadata) -> None:
    tensor = metadata.state_dict_metadata[NAME]
    assert isinstance(tensor, TensorStorageMetadata)
    tensor.properties.dtype = torch.float16


def larger(metadata: Metadata) -> None:
    tensor = metadata.state_dict_metadata[NAME]
    assert isinstance(tensor, TensorStorageMetadata)
    tensor.size = torch.Size((12, 8))


def item(**change: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        key = MetadataIndex(NAME, torch.Size((0, 0)))
        metadata.storage_data[key] = replace(metadata.storage_data[key], **change)

    return edit


def without_item(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex(NAME, torch.Size((0, 0)))]


def cut(folder: Path) -> None:
    with (folder / "__1_0.distcp").open("r+b") as file:
        file.truncate(5000)


def saved(state: dict[str, Any], **how: Any) -> Callable[[Call], None]:
    def save(call: Call) -> None:
        with warnings.catch_warnings():  # that nobody else saves
            warnings.simplefilter("ignore")
            dcp.save(state, storage_writer=dcp.FileSystemWriter(call.folder / "ck", **how), no_dist=True)

    return save


TWO = {"student": {"w": torch.ones(2)}, "critic": {"w": torch.ones(3)}}
FLAT = {"w": torch.ones(2)}


def saved_whole(call: Call) -> None:
    """What each file is by the hint: the parts of one rank, which here are all that there are."""
    save_file(load_file(call.folder / "ck" / "__0_0.distcp"), call.folder / "model.safetensors")
    call.change("ck", "model.safetensors")


ROWS = [
    Row(
        "a checkpoint copied without its hidden file",
        broken(lambda folder: (folder / ".metadata").unlink()),
        "missing-metadata",
        again("cp -a"),
    ),
    Row(
        "a file of a rank that is missing",
        broken(lambda folder: (folder / "__1_0.distcp").unlink()),
        "missing-rank",
        again("bring all of them"),
        words="the hidden .metadata",
    ),
    Row("a file of a rank that was cut off", broken(cut), "truncated-file", again("copy the file again")),
    Row("an item that nothing names", broken(said(without_item)), "missing-chunk", again("copy the directory again")),
    Row("a .metadata of another save", broken(said(other_type)), "item-mismatch", again("copy the directory again")),
    Row("a .metadata of another length", broken(said(item(length=900))), "item-mismatch", again("copy the directory")),
    Row(
        "metadata of ranks of two saves",
        broken(said(larger, "__1.metadata"), RANKS),
        "mixed-ranks",
        again("copy the directory again"),
    ),
    Row("an item that begins elsewhere", broken(said(item(offset=1))), "item-format", again("copy the file again")),
    Row(
        "items that are compressed",
        broken(said(item(transform_descriptors=["stream.other/1"]))),
        "packed-item",
        by_hand("save again without", whole),
    ),
    Row(
        "items that are safetensors",
        made(saved(FLAT, serialization_format=SerializationFormat.SAFETENSORS)),
        "item-format",
        by_hand("a plain safetensors file", saved_whole),
        words="HuggingFaceStorageWriter",
    ),
    Row(
        "two models",
        made(saved(TWO)),
        "several-roots",
        lambda call: call.args.extend(call.hint.partition(",")[0].split()[2:4]),
    ),
    Row(
        "a misspelt root of a distributed checkpoint",
        made(saved(TWO), *CONVERT, "ck", "out", "--root", "critics"),
        "unknown-root",
        lambda call: call.change("critics", call.hint.split()[2].rstrip(",")),
    ),
    Row(
        "a root of a checkpoint that has none",
        made(saved(FLAT), *CONVERT, "ck", "out", "--root", "model"),
        "unknown-root",
        by_hand("leave `root` out", lambda call: [call.args.remove(one) for one in ("--root", "model")]),
    ),
]
