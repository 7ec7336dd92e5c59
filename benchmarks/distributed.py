"""Checkpoints of ranks at full size: torch's distributed checkpoint, whose data may be holes, and a pickle a rank."""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.synthetic import Shapes

MOMENTS = ("exp_avg", "exp_avg_sq")
# As many of an item's bytes as a plan looks at.
_HEAD = 1024


def write_dcp(
    folder: Path, shapes: Shapes, world: int, *, moments: bool = False, dtype: torch.dtype = torch.bfloat16, fill: bool
) -> Path:
    """Writes what FSDP2 saves of a model, with AdamW's moments or without, and returns its directory.

    Each tensor is cut into rows, one part a rank. Names are new strings for every item, as they are when the plans of
    all ranks were gathered. ``fill`` writes random weights, and not the head of each item alone.
    """
    folder.mkdir(parents=True)
    names: dict[str, tuple[str, ...]] = {}
    metadata = Metadata({}, names, {}, StorageMeta(), "1.0.0")
    items: dict[int, list[_Part]] = defaultdict(list)
    for name, path, shape in _names(shapes, moments=moments):
        chunks = []
        for rank, (offsets, sizes) in enumerate(_rows(shape, world)):
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            items[rank].append((name, offsets, sizes, len(chunks) - 1))
        size = torch.Size(shape)
        metadata.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
        names[name] = path
    for rank in range(world):
        _write_rank(folder, rank, items.pop(rank), metadata, partial(_random if fill else _head, dtype))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def _names(shapes: Shapes, *, moments: bool) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    for name, shape in shapes.items():
        yield f"model.{name}", ("model", name), shape
    for name, shape in shapes.items() if moments else ():
        yield from ((f"optim.state.{name}.{one}", ("optim", "state", name, one), shape) for one in MOMENTS)


def _rows(shape: tuple[int, ...], world: int) -> Iterator[tuple[torch.Size, torch.Size]]:
    """``torch.chunk``'s rule: the last ranks have fewer rows, or none."""
    rows = -(-shape[0] // world)
    for rank in range(world):
        first = min(rank * rows, shape[0])
        last = min(first + rows, shape[0])
        yield torch.Size((first, *(0,) * (len(shape) - 1))), torch.Size((last - first, *shape[1:]))


# Name, offsets, sizes, and which chunk of its tensor.
_Part: TypeAlias = "tuple[str, torch.Size, torch.Size, int]"


def _write_rank(
    folder: Path, rank: int, items: list[_Part], metadata: Metadata, item: Callable[[torch.Size], tuple[bytes, int]]
) -> None:
    file_name, at = f"__{rank}_0.distcp", 0
    with (folder / file_name).open("wb") as file:
        for name, offsets, sizes, index in items:
            head, length = item(sizes)
            file.seek(at)
            file.write(head)
            key = MetadataIndex("".join(list(name)), torch.Size(list(offsets)), index)
            metadata.storage_data[key] = _StorageInfo(file_name, at, length)
            at += length
        file.truncate(at)


@cache
def _head(dtype: torch.dtype, sizes: torch.Size) -> tuple[bytes, int]:
    """What torch itself saves of a part of a tensor: its first bytes, and how long all of it is."""
    data, length = _saved(torch.zeros(sizes, dtype=dtype))
    return data[:_HEAD], length


def _random(dtype: torch.dtype, sizes: torch.Size) -> tuple[bytes, int]:
    return _saved(torch.randn(sizes, dtype=dtype) * 0.02)


def _saved(tensor: torch.Tensor) -> tuple[bytes, int]:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue(), buffer.tell()


def write_rank_pickles(folder: Path, shapes: Shapes, world: int, config: str) -> Path:
    """Writes what verl saves of a model on FSDP2, random fp32 weights, and returns its directory.

    A file a rank, each with its rows of every tensor as DTensors; ``config`` is the model's config.json.
    """
    huggingface = folder / "huggingface"
    huggingface.mkdir(parents=True)
    (huggingface / "config.json").write_text(config, "utf-8")
    # verl's merger loads a tokenizer and saves it beside the model.
    Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(huggingface / "tokenizer.json"))
    (huggingface / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', "utf-8")
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}), "utf-8")
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
            state = {}
            for name, shape in shapes.items():
                size = torch.Size(shape)
                local = torch.randn(list(_rows(shape, world))[rank][1]) * 0.02
                stride = torch.empty(size, device="meta").stride()
                state[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)
            torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    return folder
