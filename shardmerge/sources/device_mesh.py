"""Meshes of devices as they lie in a pickle: how large each axis is, and where the rank that saved it stands.

``torch.distributed.device_mesh.DeviceMesh`` pickles as a dict of its attributes. torch 2.2 to 2.9 keep the ranks as a
tensor, ``mesh``, of the mesh's shape. Later ones keep ``_layout``, the sizes (a ``shape`` in 2.10 to 2.12, ``axes`` of
a shape each since), and ``_rank_map``, the ranks of the mesh that this one was sliced from. All keep
``_coordinate_on_dim``. Attributes go by their names: the modules of these classes moved with nearly every version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from shardmerge.shown import shown
from shardmerge.sources.local_tensor import damaged_dtensor
from shardmerge.sources.pickle_bounds import are_sizes
from shardmerge.sources.pickle_values import Opaque, PickleValue, TensorRef, attributes

# A mesh has an axis for each kind of parallelism: data, replicas, tensors, context, pipeline, experts.
_MOST_AXES = 16
# A hundred times the largest runs; a number of thousands of digits cannot even be shown.
_MOST_RANKS = 10_000_000


@dataclass(frozen=True, slots=True)
class MeshPlace:
    """A mesh, and where in it the rank stands that saved it.

    Attributes
    ----------
    sizes
        Ranks along each axis.
    coordinate
        An index an axis; None for a rank that is not of the mesh.
    names
        Of the axes, ``("dp", "tp")``; empty where they have none.
    world
        Ranks of the mesh, or of the one that it was sliced from where that is known.
    """

    sizes: tuple[int, ...]
    coordinate: tuple[int, ...] | None
    names: tuple[str, ...]
    world: int

    def __str__(self) -> str:
        if len(self.names) == len(self.sizes):
            return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))
        return " x ".join(str(size) for size in self.sizes)


class Meshes:
    """The meshes of one file, each read once: all tensors of a rank share a few."""

    def __init__(self) -> None:
        self._known: dict[int, MeshPlace] = {}

    def place(self, mesh: PickleValue, where: str) -> MeshPlace:
        """Returns what a mesh says; it must live as long as this does."""
        found = self._known.get(id(mesh))
        if found is None:
            found = self._known[id(mesh)] = mesh_place(mesh, where)
        return found


def mesh_place(mesh: PickleValue, where: str) -> MeshPlace:
    """Returns what a pickled mesh says.

    Raises
    ------
    CheckpointError
        ``damaged-dtensor``: its sizes or the rank's coordinate are not said, or do not fit.
    """
    found = attributes(mesh)
    sizes = _sizes(found)
    held = found.get("_rank_map")
    mapped = prod(held.shape) if isinstance(held, TensorRef) else 0
    if sizes is None or len(sizes) > _MOST_AXES or not 0 < prod(sizes) <= _MOST_RANKS or mapped > _MOST_RANKS:
        raise damaged_dtensor("the mesh of devices does not say how large it is", where, shown(list(found)))
    names = next((found[name] for name in ("_mesh_dim_names", "mesh_dim_names") if found.get(name)), ())
    texts = tuple(name[:40] for name in names if isinstance(name, str)) if isinstance(names, tuple | list) else ()
    return MeshPlace(sizes, _coordinate(found, sizes, where), texts, max(prod(sizes), mapped))


def _sizes(mesh: Mapping[object, PickleValue]) -> tuple[int, ...] | None:
    ranks = mesh.get("mesh")
    if isinstance(ranks, TensorRef):
        return ranks.shape
    layout = attributes(mesh.get("_layout"))
    axes = layout.get("axes", layout.get("shape"))
    if type(axes) is int:
        axes = (axes,)
    sizes = [_size(axis) for axis in axes] if isinstance(axes, tuple | list) else []
    found = tuple(size for size in sizes if size is not None)
    return found if found and len(found) == len(sizes) else None


def _size(axis: PickleValue) -> int | None:
    """An axis that was flattened has a shape of its own."""
    shape = attributes(axis).get("shape") if isinstance(axis, Opaque) else axis
    if type(shape) is int:
        shape = (shape,)
    return prod(shape) if are_sizes(shape) else None


def _coordinate(mesh: Mapping[object, PickleValue], sizes: tuple[int, ...], where: str) -> tuple[int, ...] | None:
    place = mesh.get("_coordinate_on_dim", ())
    if place is None:
        return None
    if not are_sizes(place) or len(place) != len(sizes) or any(i >= n for i, n in zip(place, sizes, strict=True)):
        raise damaged_dtensor(
            "the mesh of devices does not say where this rank stands", where, shown(place), f"an index of {list(sizes)}"
        )
    return tuple(place)
