"""What one rank holds of a DTensor: its box, computed from the placements and the mesh.

``torch/distributed/tensor/_utils.py``, ``_compute_local_shape_and_global_offset``: no offset is stored. An axis is cut
as ``torch.chunk`` does, ``ceil(n / ranks)`` each, the last ones shorter or empty, once for each axis of the mesh that
shards it. In which order is said by ``shard_order`` (torch 2.10 and later), or by the placements: ``Shard`` s from the
first axis of the mesh to the last, and a ``_StridedShard`` after those whose ranks its ``split_factor`` counts
(``DTensorSpec._maybe_convert_StridedShard_to_shard_order``). So FSDP2 over tensor parallelism cuts: first the tensor
ranks' parts, then each of them. Where that gives other sizes than were saved, torch's own offsets are wrong as well,
and it is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TypeAlias

from shardmerge.errors import CheckpointError
from shardmerge.shown import shown
from shardmerge.sources.device_mesh import Meshes, MeshPlace
from shardmerge.sources.local_tensor import LocalTensor, damaged_dtensor, is_wrapped, unsupported, whole_of
from shardmerge.sources.pickle_bounds import are_sizes, is_size
from shardmerge.sources.pickle_values import Opaque, PickleValue, TensorRef, attributes, kind
from shardmerge.tensors import Shape

_ShardOrders: TypeAlias = "dict[int, list[int]]"


def is_dtensor(value: PickleValue) -> bool:
    """Tells whether a value is a DTensor."""
    return (
        isinstance(value, Opaque)
        and is_wrapped(value)
        and {"_local_tensor", "_spec"} <= attributes(_state(value)).keys()
    )


def local_dtensor(dtensor: Opaque, meshes: Meshes, where: str) -> LocalTensor:
    """Returns what the rank that saved a DTensor holds of it.

    Parameters
    ----------
    dtensor
        As ``is_dtensor`` tells.
    meshes
        Of its file.
    where
        File and name, for errors.

    Raises
    ------
    CheckpointError
        ``damaged-dtensor``: what it says of itself does not hold together. ``unsupported-tensor``: a placement that is
        not read, or a local tensor of another kind. ``box-size``: the rank holds another shape than its place says.
    """
    dtype, shape = whole_of(dtensor, where)
    held = attributes(_state(dtensor))
    spec, local = attributes(held["_spec"]), held["_local_tensor"]
    if not isinstance(local, TensorRef):
        raise unsupported("a sharded tensor whose local part is of a kind that is not read", where, kind(local))
    meta = spec.get("tensor_meta")
    stated = meta.args[0] if isinstance(meta, Opaque) and meta.args else attributes(meta).get("shape", shape)
    if not are_sizes(stated) or tuple(stated) != shape or local.dtype != dtype:
        found = f"{local.dtype.name}, {shown(stated)}"
        raise damaged_dtensor("a sharded tensor says two things of itself", where, found, f"{dtype.name}, {shape}")
    mesh = meshes.place(spec.get("mesh"), where)
    orders = _orders(spec, mesh, len(shape), where)
    if mesh.coordinate is None:
        offsets, sizes = (0,) * len(shape), (0,) * max(len(shape), 1)
    else:
        offsets, sizes = _box(shape, orders, mesh.sizes, mesh.coordinate)
    if prod(sizes) == prod(local.shape) == 0:
        return LocalTensor(dtype, shape, (), prod(mesh.sizes), mesh.world, str(mesh))
    if local.shape != sizes:
        raise _other_shape(local.shape, sizes, where)
    return LocalTensor(dtype, shape, ((offsets, local),), prod(mesh.sizes), mesh.world, str(mesh))


def _state(wrapped: Opaque) -> PickleValue:
    return wrapped.args[3]


def _box(
    shape: Shape, orders: Mapping[int, Sequence[int]], sizes: Sequence[int], coordinate: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns offsets and sizes of a rank's part."""
    offsets, left = [0] * len(shape), list(shape)
    for axis, order in orders.items():
        for mesh_axis in order:
            chunk = -(-left[axis] // sizes[mesh_axis])
            first = min(chunk * coordinate[mesh_axis], left[axis])
            offsets[axis] += first
            left[axis] = min(chunk, left[axis] - first)
    return tuple(offsets), tuple(left)


def _orders(spec: Mapping[object, PickleValue], mesh: MeshPlace, axes: int, where: str) -> _ShardOrders:
    """Returns by axis of the tensor which axes of the mesh cut it, first to last."""
    placements = spec.get("placements")
    if not isinstance(placements, tuple | list) or len(placements) != len(mesh.sizes):
        found = f"{len(placements)}" if isinstance(placements, tuple | list) else kind(placements)
        raise damaged_dtensor("a placement is not said for each axis of the mesh", where, found, str(mesh))
    shards = list(_shards(placements, axes, where))
    # Beside a strided shard it is torch's default, which means nothing.
    stated = None if any(factor > 1 for _, _, factor in shards) else _stated_order(spec.get("shard_order"))
    if stated is not None and sorted(_pairs(stated)) == sorted((axis, at) for at, axis, _ in shards):
        return stated
    orders: _ShardOrders = defaultdict(list)
    for mesh_axis, axis, factor in reversed(shards):
        orders[axis].insert(_turn(orders[axis], factor, mesh.sizes, where), mesh_axis)
    return orders


def _shards(placements: Sequence[PickleValue], axes: int, where: str) -> Iterator[tuple[int, int, int]]:
    """Yields axis of the mesh, axis of the tensor, and split factor, of those placements that cut."""
    for mesh_axis, placement in enumerate(placements):
        name = placement.type.name if isinstance(placement, Opaque) else ""
        if name == "Replicate":
            continue
        if name not in ("Shard", "_StridedShard"):
            raise unsupported("a placement of a kind that is not read", where, name or kind(placement))
        stated = attributes(placement)
        axis, factor = stated.get("dim"), stated.get("split_factor", 1)
        if not is_size(axis) or axis >= axes or not is_size(factor):
            raise damaged_dtensor(
                "a placement cuts an axis that the tensor does not have", where, shown(axis), f"{axes} axes"
            )
        yield mesh_axis, axis, factor if name == "_StridedShard" else 1


def _stated_order(orders: PickleValue) -> _ShardOrders | None:
    """``shard_order``: a tuple of ``ShardOrderEntry(tensor_dim, mesh_dims)``, a named tuple."""
    if not isinstance(orders, tuple):
        return None
    found: _ShardOrders = {}
    for entry in orders:
        args = entry.args if isinstance(entry, Opaque) else ()
        if len(args) != 2 or not is_size(args[0]) or not are_sizes(args[1]):
            return None
        found[args[0]] = list(args[1])
    return found


def _pairs(orders: _ShardOrders) -> Iterator[tuple[int, int]]:
    return ((axis, mesh_axis) for axis, order in orders.items() for mesh_axis in order)


def _turn(order: Sequence[int], factor: int, sizes: Sequence[int], where: str) -> int:
    """Returns after how many cuts of the same axis comes one whose split factor is the number of parts there are."""
    parts = 1
    for turn, mesh_axis in enumerate(order):
        if parts == factor:
            return turn
        parts *= sizes[mesh_axis]
    if parts != factor:
        found = f"_StridedShard with the split factor {factor}"
        raise unsupported("a tensor is sharded in rows that lie apart, which is no box", where, found)
    return len(order)


def _other_shape(found: Shape, expected: Shape, where: str) -> CheckpointError:
    return CheckpointError(
        "box-size",
        "a rank holds another part of a tensor than its placements and its mesh say",
        where=where,
        found=str(list(found)),
        expected=str(list(expected)),
    )
