"""Two checkpoints of any format, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shardmerge.execute.executors.contract import Progress
from shardmerge.execute.gather import gather
from shardmerge.ops.arrays import as_array
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Catalog, TensorEntry

# Bytes of a tensor compared at a time.
_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which two checkpoints differ.

    Attributes
    ----------
    name
        The tensor.
    what
        ``only in A``, ``only in B``, ``dtype``, ``shape`` or ``values``.
    detail
        For people: the two sides, or how many elements differ and by how much.
    """

    name: str
    what: str
    detail: str


def compare(left: Catalog, right: Catalog, progress: Progress | None = None) -> Iterator[Difference]:
    """Yields every difference between two checkpoints, tensor by tensor; names, types, shapes, then values.

    Floats are compared after widening to float32 (float64 stays), so a cast copy differs in dtype and, where rounding
    changed something, in values. NaN equals NaN.
    """
    pool = FilePool()
    for name in left.names():
        if name not in right:
            yield Difference(name, "only in A", _describe(left[name]))
    for name in right.names():
        if name not in left:
            yield Difference(name, "only in B", _describe(right[name]))
            continue
        if name in left:
            yield from _compare_tensor(pool, name, left[name], right[name])
            if progress is not None:
                progress(left[name].nbytes)


def _compare_tensor(pool: FilePool, name: str, left: TensorEntry, right: TensorEntry) -> Iterator[Difference]:
    if left.shape != right.shape:
        yield Difference(name, "shape", f"{list(left.shape)} and {list(right.shape)}")
        return
    if left.dtype != right.dtype:
        yield Difference(name, "dtype", f"{left.dtype} and {right.dtype}")
    count, largest = 0, 0.0
    step = _BLOCK // 8
    for start in range(0, left.numel, step):
        size = min(step, left.numel - start)
        a, b = (_widened(pool, entry, start, size) for entry in (left, right))
        unequal = ~((a == b) | ((a != a) & (b != b)))  # noqa: PLR0124  # NaN is what differs from itself
        count += int(np.count_nonzero(unequal))
        if unequal.any():
            gaps = np.abs(a[unequal].astype(np.complex128) - b[unequal].astype(np.complex128))
            largest = max(largest, float(np.nanmax(gaps, initial=0.0)))
    if count:
        yield Difference(name, "values", f"{count:,} of {left.numel:,} elements, by at most {largest:g}")


def _widened(
    pool: FilePool, entry: TensorEntry, start: int, count: int
) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    data = bytearray(count * entry.dtype.itemsize)
    gather(pool, entry, start, memoryview(data))
    array = as_array(memoryview(data), entry.dtype)
    narrow = entry.dtype.kind == "float" and entry.dtype.itemsize < 8
    return array.astype(np.float32) if narrow else array


def _describe(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"
