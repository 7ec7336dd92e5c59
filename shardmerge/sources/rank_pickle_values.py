"""The tensors of one rank's file, each as the boxes that the rank holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError
from shardmerge.sources.device_mesh import Meshes
from shardmerge.sources.flat_parameters import check_named
from shardmerge.sources.local_tensor import LocalTensor
from shardmerge.sources.pickle_values import PickleValue, TensorRef
from shardmerge.sources.sharded import local_tensor
from shardmerge.sources.state_dict import find_state, is_tensor, named_leaves, no_tensors, unsupported_tensor
from shardmerge.sources.torch_file import ContentKey, TorchFile
from shardmerge.tensors import Box, Extent, Shape, Strided

_Part: TypeAlias = "tuple[Box, ContentKey, tuple[object, ...]]"


@dataclass(frozen=True, slots=True)
class RankTensor:
    """A tensor in the file of one rank.

    Attributes
    ----------
    dtype, shape, ranks, world, mesh
        As in ``LocalTensor``.
    parts
        The boxes that the rank holds, each with ``TorchFile.content_key`` and with what two names of one tensor share.
    """

    dtype: DType
    shape: Shape
    ranks: int
    world: int
    mesh: str
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class RankTensors:
    """The named tensors of one rank's file, where they were found, and the names of what is no tensor."""

    root_key: str
    tensors: dict[str, RankTensor]
    skipped: tuple[str, ...]


def rank_tensors(file: TorchFile, root: str) -> RankTensors:
    """Returns the tensors of a rank's file.

    Raises
    ------
    CheckpointError
        As ``state_dict``, ``local_tensor`` and ``TorchFile.entry``.
    """
    root_key, holder = find_state(file.root, root)
    meshes = Meshes()
    tensors: dict[str, RankTensor] = {}
    skipped: list[str] = []
    for name, leaf in named_leaves(holder):
        if name in tensors:
            raise CheckpointError("duplicate-name", "two tensors have the same name", where=f"{file.path}, {name}")
        check_named(name, file.path)
        local = _local(leaf, meshes, f"{file.path}, {name}")
        if local is not None:
            tensors[name] = _rank_tensor(file, name, local)
        elif is_tensor(leaf):
            raise unsupported_tensor(f"{file.path}, {name}", leaf)
        else:
            skipped.append(name)
    if not tensors:
        raise no_tensors(holder, root_key)
    return RankTensors(root_key, tensors, tuple(skipped))


def _local(leaf: PickleValue, meshes: Meshes, where: str) -> LocalTensor | None:
    if isinstance(leaf, TensorRef):
        return LocalTensor(leaf.dtype, leaf.shape, (((0,) * len(leaf.shape), leaf),))
    return local_tensor(leaf, meshes, where)


def _rank_tensor(file: TorchFile, name: str, local: LocalTensor) -> RankTensor:
    parts = tuple(part for offsets, ref in local.parts for part in _parts(file, name, offsets, ref))
    return RankTensor(local.dtype, local.shape, local.ranks, local.world, local.mesh, parts)


def _parts(file: TorchFile, name: str, offsets: tuple[int, ...], ref: TensorRef) -> tuple[_Part, ...]:
    """Returns the one box of some elements; none where there are none."""
    pieces = file.entry(name, ref).pieces
    if not pieces:
        return ()
    held = pieces[0].held
    assert isinstance(held, Extent | Strided)  # a torch file holds nothing else
    return ((Box(offsets, ref.shape, held), file.content_key(ref), (offsets, *file.alias_key(ref))),)
