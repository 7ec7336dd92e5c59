"""What one rank holds of a tensor, whichever class of torch says so."""

from __future__ import annotations

from shardmerge.sources.device_mesh import Meshes
from shardmerge.sources.dtensor import is_dtensor, local_dtensor
from shardmerge.sources.local_tensor import LocalTensor
from shardmerge.sources.pickle_values import Opaque, PickleValue
from shardmerge.sources.sharded_tensor import is_sharded_tensor, local_sharded_tensor


def local_tensor(value: PickleValue, meshes: Meshes, where: str) -> LocalTensor | None:
    """Returns what a rank holds of a DTensor or ShardedTensor, None for any other value; raises as these do."""
    if isinstance(value, Opaque) and is_dtensor(value):
        return local_dtensor(value, meshes, where)
    if isinstance(value, Opaque) and is_sharded_tensor(value):
        return local_sharded_tensor(value, where)
    return None
