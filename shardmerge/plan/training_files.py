"""The files of a checkpoint that training goes on from: of torch (``dcp``), or of DeepSpeed (``zero-universal``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.plan.dcp_layout import (
    METADATA,
    ItemFile,
    Keys,
    StoredItem,
    lay_out_items,
    metadata_pickle,
    stored_tensor,
)
from shardmerge.plan.dcp_optimizer import SCALAR, moment_keys, optimizer_root, setting_items, step_items
from shardmerge.plan.moments import NO_MOMENTS, Moments, moment_tensors
from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.plan.torch_layout import TorchLayout, lay_out_torch
from shardmerge.plan.universal_layout import FOLDER, PARAM, tensor_path, universal_files
from shardmerge.shown import shown
from shardmerge.tensors import Shape, SideFile

Files: TypeAlias = tuple[list[PlannedShard], list[SideFile]]
Cut: TypeAlias = Callable[[Sequence[PlannedTensor]], Iterable[Sequence[PlannedTensor]]]

# Linux takes no longer name of a file or a folder, in bytes.
_LONGEST_NAME = 255
# Names that one error tells of.
_MOST_PROBLEMS = 8


def dcp_files(
    tensors: Sequence[PlannedTensor], cut: Cut, folder: str, root: tuple[str, ...], moments: Moments = NO_MOMENTS
) -> Files:
    """Returns a distributed checkpoint of torch, its files called as rank 0 calls its own.

    Parameters
    ----------
    tensors
        The model.
    cut
        What spreads tensors over files.
    folder
        Inside the output directory.
    root
        The keys under which a state dict holds the model: ``("model",)`` for ``dcp.load({"model": ...})``.
    moments
        What the optimizer remembers; it is put beside the model.

    Raises
    ------
    TargetError
        ``unusable-name``: two things would have one name in the checkpoint.
    """
    beside = optimizer_root(root)
    keys: dict[str, Keys] = {tensor.name: (*root, tensor.stored) for tensor in tensors}
    listed = list(tensors)
    for kind, weight, moment in moment_tensors(tensors, moments):
        keys[moment.name] = moment_keys(beside, weight, kind)
        listed.append(replace(moment, stored=".".join(map(str, keys[moment.name]))))
    made = [
        torch_shard(_inside(folder, f"__0_{number}.distcp"), part, lay_out_items(_listed(part)))
        for number, part in enumerate(cut(listed))
    ]
    items = [stored_tensor(keys[one.name], one, _base(shard.name)) for shard in made for one in shard.tensors]
    tables = []
    if moments.optimizer.groups:
        small = ItemFile(f"__0_{len(made)}.distcp")
        items += (small.put(where, SCALAR, item) for where, item in step_items(beside, moments.optimizer))
        items += (small.put(where, None, item) for where, item in setting_items(beside, moments.optimizer))
        tables.append(SideFile(_inside(folder, small.name), (small.content(),)))
    raise_all(_twice(items))
    return made, [*tables, SideFile(_inside(folder, METADATA), (metadata_pickle(items),))]


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _twice(items: Iterable[StoredItem]) -> Iterator[ShardmergeError]:
    """Keys with dots in them may come to one name: the setting ``lr`` of group 0, and of a weight that is called 0."""
    names = Counter(item.name for item in items)
    for name in [name for name, count in names.items() if count > 1][:_MOST_PROBLEMS]:
        yield TargetError(
            "unusable-name",
            "two items would have the same name in the distributed checkpoint",
            where=METADATA,
            found=shown(name),
            hint="leave --with-optimizer out: the optimizer then begins anew",
        )


def zero_universal_files(tensors: Sequence[PlannedTensor], folder: str, moments: Moments = NO_MOMENTS) -> Files:
    """Returns a universal checkpoint of DeepSpeed, a file each tensor, and each moment of it.

    Raises
    ------
    TargetError
        ``unusable-name``, of all names at once: one that is no folder.
    """
    raise_all(_no_folders(tensors))
    made = [_own_file(tensor, folder, tensor.stored, "fp32") for tensor in tensors]
    made += (_own_file(one, folder, weight, kind) for kind, weight, one in moment_tensors(tensors, moments))
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
                "DeepSpeed keeps each parameter in a folder of its name, and no folder can have this name",
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
