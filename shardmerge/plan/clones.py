"""Which bytes of a shard are bytes of a source file that a file system could share. Pure; nothing is tried here.

A file system that clones shares whole blocks: a range of the output can be one of the source only where both begin at
the same offset modulo the block. ``targets.phases`` lays tensors out so that they do; this module finds where they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardmerge.packed_names import packed_name
from shardmerge.plan.shard import PlannedShard, PlannedTensor, is_copy
from shardmerge.plan.value import Plan
from shardmerge.tensors import Extent, TensorEntry
from shardmerge.tensors.pieces import single_extent

# The block of XFS, btrfs and ext4 as they are made, in bytes. Where blocks are larger, most ranges are copied.
BLOCK = 4096

# A shorter range is copied: on XFS a clone and a copy of 64 KiB both took 23 us (btrfs 24 and 95), and what is copied
# gets a checksum.
SMALLEST = 64 << 10


@dataclass(frozen=True, slots=True)
class Clone:
    """``nbytes`` of a source file that are, whole blocks, bytes of a shard.

    Attributes
    ----------
    file
        Absolute path of the source.
    start
        Where in the source, in bytes.
    offset
        Where in the shard, in bytes: the same modulo ``BLOCK``.
    nbytes
        A multiple of ``BLOCK``.
    """

    file: str
    start: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """In the shard."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Moved:
    """How the bytes of all tensors come to the output; the three add up to the plan's ``tensor_bytes``.

    Attributes
    ----------
    cloned
        Shared with the sources by the file system.
    copied
        Read and written as they are, or in another order.
    computed
        Cast, or made by any other arithmetic.
    """

    cloned: int
    copied: int
    computed: int


def moved(plan: Plan, cloned: int) -> Moved:
    """Returns how the bytes of a plan come to the output if so many of them are cloned."""
    computed = sum(tensor.nbytes for tensor in plan.tensors() if not is_copy(tensor.entry))
    return Moved(cloned, plan.tensor_bytes - computed - cloned, computed)


def whole_extent(entry: TensorEntry) -> Extent | None:
    """Returns the one extent of a file that holds a tensor byte for byte.

    None where there is none, or several, another order, or bytes that have to be unpacked.
    """
    found = single_extent(entry, 0, entry.numel) if entry.numel else None
    return None if found is None or packed_name(found.file) else found


def clones(shard: PlannedShard) -> Iterator[Clone]:
    """Yields the ranges of a shard that can be cloned, in ascending order, none shorter than ``SMALLEST``.

    A torch file has none: it holds the CRC-32 of every tensor, so every tensor must be seen.
    """
    if shard.checksums:
        return
    file, start, offset, nbytes = "", 0, 0, 0
    for tensor in shard.tensors:
        extent = whole_extent(tensor.entry)
        if extent is None or (extent.offset - tensor.offset) % BLOCK:
            continue
        if (extent.file, extent.offset, tensor.offset) != (file, start + nbytes, offset + nbytes):
            yield from _whole_blocks(file, start, offset, nbytes)
            file, start, offset, nbytes = extent.file, extent.offset, tensor.offset, 0
        nbytes += extent.nbytes
    yield from _whole_blocks(file, start, offset, nbytes)


def inner_blocks(start: int, nbytes: int) -> tuple[int, int]:
    """Returns where the first whole block of a range begins, and the bytes of all whole blocks in it."""
    first = -(-start // BLOCK) * BLOCK
    return first, max((start + nbytes) // BLOCK * BLOCK - first, 0)


def overlapping(tensor: PlannedTensor, ranges: Sequence[Clone]) -> Iterator[Clone]:
    """Yields those of the ranges that hold some bytes of a tensor."""
    end = tensor.offset + tensor.nbytes
    return (one for one in ranges if one.offset < end and tensor.offset < one.end)


def ranges_left(tensor: PlannedTensor, cloned: Sequence[Clone]) -> Iterator[tuple[int, int]]:
    """Yields what of a tensor is not cloned as (start, count), in elements.

    Clones begin and end where blocks do, and a tensor that has some is aligned to its type, so no element is split.
    """
    size = tensor.dtype.itemsize
    cursor, end = tensor.offset, tensor.offset + tensor.nbytes
    for one in cloned:
        if one.end <= cursor or one.offset >= end:
            continue
        if one.offset > cursor:
            yield (cursor - tensor.offset) // size, (one.offset - cursor) // size
        cursor = min(one.end, end)
    if cursor < end:
        yield (cursor - tensor.offset) // size, (end - cursor) // size


def _whole_blocks(file: str, start: int, offset: int, nbytes: int) -> Iterator[Clone]:
    first, length = inner_blocks(start, nbytes)
    if length >= SMALLEST:
        yield Clone(file, first, offset + first - start, length)
