"""Tensors made by ops, read through the engine's assembler: with any tile, and with the memory that takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shardmerge.compose import compose
from shardmerge.dtypes import DTYPES, DType
from shardmerge.execute.gather import Assembler
from shardmerge.ops.arrays import Array, as_array, numpy_dtype
from shardmerge.ops.contract import Op, ParamValue
from shardmerge.ops.registry import OPS
from shardmerge.plan.memory import _need, tile_elements
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Extent, TensorEntry, dense

TILES = (1 << 10, 3000, 64 << 10, 2 << 20)


def dtype_of(values: Array) -> DType:
    """Returns the table's row of an array's type."""
    return next(row for row in DTYPES.values() if numpy_dtype(row) == values.dtype)


def stored(folder: Path, values: Array) -> TensorEntry:
    """Writes an array to a file of its own, at an odd offset, and returns its entry."""
    path = folder / f"data{len(list(folder.iterdir()))}"
    data = values.tobytes()
    path.write_bytes(b"odd" + data)
    return TensorEntry(path.name, dtype_of(values), values.shape, dense(Extent(str(path), 3, len(data)), values.size))


def built(name: str, **values: ParamValue) -> Op:
    """Returns the op that a rule would make, defaults included."""
    kind = OPS[name]
    known = {param.name: param.default for param in kind.params if param.default is not None}
    return kind.build({"salt": "salt", **known, **values})


def made(op: Op, folder: Path, inputs: Sequence[Array]) -> TensorEntry:
    """Returns the entry that an op makes of arrays in files."""
    return compose(op, [stored(folder, values) for values in inputs])


def filled(entry: TensorEntry, tile: int = 2 << 20, step: int = 0) -> Array:
    """Reads an entry in steps of so many elements, whole for 0."""
    out = np.empty(entry.nbytes, np.uint8)
    size, assembler = entry.dtype.itemsize, Assembler(FilePool(), tile)
    for start in range(0, entry.numel, step or max(entry.numel, 1)):
        stop = min(start + (step or entry.numel), entry.numel)
        assembler.fill(entry, start, out.data[start * size : stop * size])
    return as_array(out.data, entry.dtype).reshape(entry.shape)


def check_cuts(entry: TensorEntry) -> Array:
    """Reads an entry with several tiles and steps, checks that the bits are the same, and returns it."""
    whole = filled(entry)
    for tile in TILES:
        for step in (0, 4099) if entry.numel > 5000 else (0, 7, 64):
            assert filled(entry, tile, step).tobytes() == whole.tobytes(), (tile, step)
    return whole


def check_peak(entry: TensorEntry) -> None:
    """Checks for several tiles that no more is allocated than was planned."""
    for tile in (64 << 10, 256 << 10, 2 << 20):
        count = min(tile_elements(entry, tile), entry.numel)
        out = np.empty(count * entry.dtype.itemsize, np.uint8)
        assembler = Assembler(FilePool("pread"), tile)
        size = entry.dtype.itemsize
        assembler.fill(entry, 0, out.data[:size])  # imports and open files are not what is measured
        assembler.forget()
        tracemalloc.start()
        try:
            for start in range(0, entry.numel, count):
                assembler.fill(entry, start, out.data[: min(count, entry.numel - start) * size])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # Buffers that wait to be used again are counted by the worker: one tile.
        assert peak <= _need(entry, count, tile) + tile, (tile, peak, _need(entry, count, tile))
