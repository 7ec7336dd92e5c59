"""The files of a checkpoint that training goes on from: of torch (``dcp``), or of DeepSpeed (``zero-universal``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.plan.dcp_layout import METADATA, lay_out_items, metadata_pickle
from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.plan.torch_layout import TorchLayout, lay_out_torch
from shardmerge.plan.universal_layout import FOLDER, NO_MOMENTS, PARAM, Moments, tensor_path, universal_files
from shardmerge.shown import shown
from shardmerge.tensors import Shape, SideFile

Files: TypeAlias = tuple[list[PlannedShard], list[SideFile]]

# Linux takes no longer name of a file or a folder, in bytes.
_LONGEST_NAME = 255


def dcp_files(parts: Iterable[Sequence[PlannedTensor]], folder: str, root: tuple[str, ...]) -> Files:
    """Returns a distributed checkpoint of torch, a file each part, called as rank 0 calls its own."""
    made = [
        torch_shard(_inside(folder, f"__0_{number}.distcp"), part, lay_out_items(_listed(part)))
        for number, part in enumerate(parts)
    ]
    return made, [SideFile(_inside(folder, METADATA), (metadata_pickle(made, root),))]


def zero_universal_files(tensors: Sequence[PlannedTensor], folder: str, moments: Moments = NO_MOMENTS) -> Files:
    """Returns a universal checkpoint of DeepSpeed, a file each tensor, and each moment of it.

    Raises
    ------
    TargetError
        ``unusable-name``, of all names at once: one that is no folder.
    """
    raise_all(_no_folders(tensors))
    made = [_own_file(tensor, folder, tensor.stored, "fp32") for tensor in tensors]
    for kind, entries in moments.entries.items():
        for one in (tensor for tensor in tensors if tensor.stored in entries):
            moment = replace(one, name=f"{kind}:{one.name}", entry=entries[one.stored])
            made.append(_own_file(moment, folder, one.stored, kind))
    shapes = {tensor.stored: tensor.shape for tensor in tensors}
    return made, [SideFile(_inside(folder, path), (data,)) for path, data in universal_files(shapes, moments)]


def _own_file(tensor: PlannedTensor, folder: str, weight: str, kind: str) -> PlannedShard:
    layout = lay_out_torch([(PARAM, tensor.dtype, tensor.shape)], kind)
    return torch_shard(_inside(folder, tensor_path(weight, kind)), [replace(tensor, stored=PARAM)], layout)


def torch_shard(path: str, tensors: Sequence[PlannedTensor], layout: TorchLayout) -> PlannedShard:
    """Returns a file of torch's, its tensors at their places."""
    placed = tuple(replace(tensor, offset=at) for tensor, at in zip(tensors, layout.offsets, strict=True))
    checksums = {tensor.name: fields for tensor, fields in zip(tensors, layout.crc_fields, strict=True) if fields}
    return PlannedShard(path, layout.nbytes, layout.blobs, placed, checksums)


def _listed(tensors: Sequence[PlannedTensor]) -> list[tuple[str, DType, Shape]]:
    return [(tensor.stored, tensor.dtype, tensor.shape) for tensor in tensors]


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _no_folders(tensors: Iterable[PlannedTensor]) -> Iterator[ShardmergeError]:
    for tensor in tensors:
        name = tensor.stored
        if name in ("", ".", "..", "optimizer_state.pt") or not _is_file_name(name):
            yield TargetError(
                "unusable-name",
                "DeepSpeed keeps each parameter in a folder of its name, and no folder is called so",
                where=f"{tensor.rule}, in {FOLDER}/zero",
                found=shown(name),
                expected=f"1 to {_LONGEST_NAME} bytes without a slash",
                hint="give the tensor another name in a mapping, or `drop` it",
            )


def _is_file_name(name: str) -> bool:
    try:
        return not {"/", "\0"} & set(name) and len(name.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:  # a lone surrogate
        return False
