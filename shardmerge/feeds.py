"""Lazy tensors for libraries that ask for torch's: a state dict, and a reader of torch's distributed checkpoints.

Imported where it is asked for, since it needs torch. Every tensor is read when the library takes it, and not before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardmerge.dtypes import DType
from shardmerge.ops.arrays import Array
from shardmerge.tensors import Shape

# Bytes that are read at a time on their way into a tensor of the caller.
_TILE = 16 << 20


class Readable(Protocol):
    """A tensor that reads its bytes when asked: see ``lazy.LazyTensor``."""

    @property
    def dtype(self) -> DType:
        """Element type."""

    @property
    def shape(self) -> Shape:
        """Shape."""

    def torch(self) -> torch.Tensor:
        """Returns the whole tensor."""

    def __getitem__(self, index: tuple[slice, ...]) -> Array:
        """Reads a part."""


class TorchState(Mapping[str, torch.Tensor]):
    """A state dict whose tensors are read when they are taken, every time anew; nothing is kept."""

    def __init__(self, tensors: Mapping[str, Readable]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].torch()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"TorchState({len(self)} tensors, read when taken)"


class CheckpointReader(StorageReader):  # type: ignore[misc]  # torch is not there for the type checker
    """Gives tensors to ``torch.distributed.checkpoint.load``: each rank reads its own parts, into the tensors it has.

    Parameters
    ----------
    tensors
        By name. The names are those of the state dict that is loaded.
    """

    def __init__(self, tensors: Mapping[str, Readable]) -> None:
        self._tensors = tensors

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Tells whether there is such a path; torch asks where it looks for a reader itself."""
        return Path(checkpoint_id).exists()

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Refuses another checkpoint than the one that was opened.

        Raises
        ------
        ValueError
            ``checkpoint_id`` was given.
        """
        if checkpoint_id is not None:
            raise ValueError("this reader has its checkpoint: leave checkpoint_id out of dcp.load")

    def read_metadata(self) -> Metadata:
        """Returns names, types and shapes; every tensor is one chunk, whatever files it lies in."""
        return Metadata({name: _stored(tensor) for name, tensor in self._tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:  # torch's
        """Does nothing: the checkpoint is open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the tensors of a rank, one after the other, a tile at a time.

        Raises
        ------
        CheckpointError
            As ``LazyTensor.numpy``.
        """
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            self._fill(item, target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, item: ReadItem, target: torch.Tensor) -> None:
        tensor = self._tensors[item.storage_index.fqn]
        box = [slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True)]
        if not box:
            target.copy_(_as_torch(tensor[()], tensor.dtype))
            return
        rows, row_bytes = item.lengths[0], prod(item.lengths[1:]) * tensor.dtype.itemsize
        step = max(_TILE // max(row_bytes, 1), 1)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            part = tensor[(slice(box[0].start + start, box[0].start + end), *box[1:])]
            target[start:end].copy_(_as_torch(part, tensor.dtype))


def _stored(tensor: Readable) -> TensorStorageMetadata:
    size = torch.Size(tensor.shape)
    properties = TensorProperties(dtype=getattr(torch, tensor.dtype.torch))
    return TensorStorageMetadata(properties, size, [ChunkStorageMetadata(torch.Size([0] * len(size)), size)])


def _as_torch(array: Array, dtype: DType) -> torch.Tensor:
    """Returns an array as a tensor of the same bytes; torch does not take the types of ml_dtypes."""
    kind = getattr(torch, dtype.torch)
    if not array.size:
        return torch.empty(array.shape, dtype=kind)
    return torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).view(kind).reshape(array.shape)
