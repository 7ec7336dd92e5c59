"""Single weights of a checkpoint, read to tell whether two files speak of the same ones.

Training computes with the 16-bit ``module``, which is the fp32 masters, rounded to the nearest (ties to even) after
every step: ``bit16_partition.data.copy_(fp32_partition.data)`` in ``runtime/zero/stage_1_and_2.py`` and the others. So
the two agree bit for bit in one save, and in two saves, or under a wrong name, they do not. A few thousand of them are
read, four bytes and two each.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import PurePath
from typing import NamedTuple

from shardmerge.dtypes import DType
from shardmerge.shown import shown
from shardmerge.sources.pickle_values import TensorRef
from shardmerge.sources.torch_file import TorchFile
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Extent, Piece, TensorEntry

# The float types that DeepSpeed trains in. BF16 is the upper half of an F32.
_FORMATS = {"F32": "<f", "F16": "<e"}
_READ = frozenset({"F32", "F16", "BF16"})
# What may differ where counters agree: one in so many, of a file and of a tensor. A run may clip weights of the module
# after the last step; the files of another save, or names exchanged, differ in most of them.
_FEW_OF_A_FILE, _FEW = 4, 2
_NAN = b"NaN"  # a NaN is any of many patterns


class Stored(NamedTuple):
    """A tensor of a torch file."""

    file: TorchFile
    ref: TensorRef


class Samples:
    """Reads single elements, through a pool of open files."""

    def __init__(self) -> None:
        self._pool = FilePool()

    def value(self, file: str, offset: int, dtype: DType) -> float:
        """Returns the number at a byte of a file."""
        return number_of(self._pool.get(file).read(offset, dtype.itemsize), dtype)

    def elements(self, file: TorchFile, ref: TensorRef, indices: Sequence[int]) -> list[float]:
        """Returns elements of a tensor, by their row-major numbers; all of them at once where that is one read."""
        start = file.storages[ref.storage.key].offset
        size = ref.dtype.itemsize
        if len(indices) == prod(ref.shape) and is_dense(ref):
            raw = self._pool.get(file.path).read(start + ref.offset * size, len(indices) * size)
            return [number_of(raw[at : at + size], ref.dtype) for at in range(0, len(raw), size)]
        return [self.value(file.path, start + place(ref, index) * size, ref.dtype) for index in indices]

    def bits(self, entry: TensorEntry, index: int) -> bytes:
        """Returns the bytes of an element of a tensor that lies in flat ranges, by its row-major number."""
        piece = entry.pieces[bisect_right(entry.pieces, index, key=lambda piece: piece.start) - 1]
        assert isinstance(piece.held, Extent)  # partitions are dense
        size = entry.dtype.itemsize
        return self._pool.get(piece.held.file).read(piece.held.offset + (index - piece.start) * size, size)


def is_float(dtype: DType) -> bool:
    """Tells whether the elements are of a type that is compared."""
    return dtype.name in _READ


def number_of(raw: bytes, dtype: DType) -> float:
    """Returns the number that little-endian bytes of F32, F16 or BF16 say."""
    found: float = struct.unpack(_FORMATS.get(dtype.name, "<f"), b"\0\0" + raw if dtype.name == "BF16" else raw)[0]
    return found


def rounded_bytes(value: float, dtype: DType) -> bytes:
    """Returns the bytes of a number (an F32 or narrower one) rounded to the nearest of a type, ties to even."""
    if value != value:  # noqa: PLR0124  # NaN
        return _NAN
    if dtype.name == "BF16":
        bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to_bytes(2, "little")
    try:
        return struct.pack(_FORMATS[dtype.name], value)
    except OverflowError:
        return struct.pack(_FORMATS[dtype.name], float("inf") if value > 0 else float("-inf"))


def spread_places(numel: int, most: int) -> list[int]:
    """Returns at most so many row-major numbers of elements, first and last among them, evenly apart."""
    if numel <= most:
        return list(range(numel))
    return [index * (numel - 1) // (most - 1) for index in range(most)] if most > 1 else [0]


def place(ref: TensorRef, index: int) -> int:
    """Returns where in its storage an element of a view lies, by its row-major number."""
    at = ref.offset
    for size, stride in zip(reversed(ref.shape), reversed(ref.strides), strict=True):
        index, here = divmod(index, size)
        at += here * stride
    return at


def is_dense(ref: TensorRef) -> bool:
    """Tells whether the elements of a view lie one behind the other, in its order."""
    expected = 1
    for size, stride in zip(reversed(ref.shape), reversed(ref.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


@dataclass(slots=True)
class Tally:
    """How many sampled weights were compared with the module's, and how many of them did not round to those.

    Attributes
    ----------
    files, tensors
        Both counts, by file, and by name of the tensor.
    """

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, file: str, name: str, compared: int, differing: int) -> None:
        """Counts the weights of one piece."""
        for table, key in ((self.files, file), (self.tensors, name)):
            before = table.get(key, (0, 0))
            table[key] = before[0] + compared, before[1] + differing

    @property
    def differing(self) -> int:
        """Weights that did not round to the module's."""
        return sum(differing for _, differing in self.files.values())

    def worst(self) -> str:
        """Tells of a file or tensor with more differing weights than a few, ``""`` if there is none."""
        for what, table, few in (("of {}", self.files, _FEW_OF_A_FILE), ("of the tensor {}", self.tensors, _FEW)):
            for key, (compared, differing) in table.items():
                if differing * few > compared:
                    of = what.format("/".join(PurePath(key).parts[-2:]) if table is self.files else shown(key))
                    return f"{differing} of {compared} sampled weights {of}"
        return ""


def same_weights(one: TensorEntry, other: TensorEntry, most: int) -> bool:
    """Tells whether two tensors have one shape and, in ``most`` elements at the most, one and the same values."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    samples = Samples()
    places = spread_places(one.numel, most)
    return all(samples.bits(one, index) == samples.bits(other, index) for index in places)


def compare_masters(module: Mapping[str, Stored], entries: Mapping[str, TensorEntry], most: int) -> Tally:
    """Compares about ``most`` masters, spread over all pieces of all tensors, with the module's weights of their names.

    Parameters
    ----------
    module
        The 16-bit tensors, by name.
    entries
        Masters, by name. Those whose module has another shape (a placeholder), or none, are left out.
    most
        About how many weights.
    """
    names = [name for name, entry in entries.items() if name in module and _comparable(entry, module[name].ref)]
    starts = list(accumulate((len(entries[name].pieces) for name in names), initial=0))
    each = max(most // max(starts[-1], 1), 1)
    samples, tally = Samples(), Tally()
    for index in spread_places(starts[-1], most):
        at = bisect_right(starts, index) - 1
        entry = entries[names[at]]
        piece = entry.pieces[index - starts[at]]
        assert isinstance(piece.held, Extent)  # partitions are dense
        indices = spread_places(piece.count, each)
        differing = _differing(samples, module[names[at]], piece, entry.dtype, indices)
        tally.add(piece.held.file, names[at], len(indices), differing)
    return tally


def _comparable(entry: TensorEntry, ref: TensorRef) -> bool:
    return ref.shape == entry.shape and is_float(entry.dtype) and is_float(ref.dtype)


def _differing(samples: Samples, there: Stored, piece: Piece, dtype: DType, indices: Sequence[int]) -> int:
    """Returns how many elements of a piece of masters do not round to those of the module's tensor."""
    held = piece.held
    assert isinstance(held, Extent)
    narrow = dtype if dtype.itemsize < there.ref.dtype.itemsize else there.ref.dtype
    theirs = samples.elements(there.file, there.ref, [piece.start + index for index in indices])
    mine = [samples.value(held.file, held.offset + index * dtype.itemsize, dtype) for index in indices]
    return sum(rounded_bytes(a, narrow) != rounded_bytes(b, narrow) for a, b in zip(mine, theirs, strict=True))
