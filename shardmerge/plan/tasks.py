"""What a thread takes at a time: elements of one tensor, made tile by tile, or tensors that share a state. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from shardmerge.packed_names import packed_name
from shardmerge.plan.clones import Clone, ranges_left
from shardmerge.plan.memory import has_state, share_state, tile_elements
from shardmerge.plan.order import first_byte, ordered
from shardmerge.plan.shard import PlannedShard, PlannedTensor

# Bytes of a task, at least, where a tensor has so many. Its checksum is chained from tile to tile and joined with the
# others' once: a join takes 9 us, 2 % of the time of a tile and nothing of a task's. Threads that end a part wait for
# each other for half a task, 5 ms.
_TASK = 16 << 20


@dataclass(frozen=True, slots=True)
class Task:
    """Elements ``[start, start + count)`` of a planned tensor, made ``step`` at a time from the first to the last."""

    tensor: PlannedTensor
    start: int
    count: int
    step: int

    @property
    def offset(self) -> int:
        """Where it begins in the file, in bytes."""
        return self.tensor.offset + self.start * self.tensor.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.count * self.tensor.dtype.itemsize

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Yields the first element and the number of elements of every tile."""
        stop = self.start + self.count
        for start in range(self.start, stop, self.step):
            yield start, min(self.step, stop - start)


def batches(shard: PlannedShard, tile: int, cloned: Sequence[Clone] = ()) -> Iterator[list[Task]]:
    """Yields the ``tasks`` that one thread makes one after the other.

    Most are alone. Tensors with one state, A and B of a LoRA that is extracted, are together: it is found once.
    """
    batch: list[Task] = []
    for task in tasks(shard, tile, cloned):
        if batch and not share_state(batch[-1].tensor.entry, task.tensor.entry):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def front_to_back(made: Iterable[list[Task]]) -> list[list[Task]]:
    """Returns batches in the order of the file that is written, for whoever reads it back behind them.

    Where a source is compressed they stay in its order, in which it is unpacked once.
    """
    found = list(made)
    if any(packed_name(first_byte(task.tensor.entry)[0]) for batch in found for task in batch):
        return found
    return sorted(found, key=lambda batch: batch[0].offset)


def tasks(shard: PlannedShard, tile: int, cloned: Sequence[Clone] = ()) -> Iterator[Task]:
    """Yields the tasks of a file of which some ranges are there already, in the order of the sources.

    Parameters
    ----------
    shard
        The file.
    tile
        Bytes of a tile, on the larger side of a cast.
    cloned
        What is there already.
    """
    for tensor in ordered(shard.tensors):
        step = tile_elements(tensor.entry, tile)
        tiles = max(_TASK // (step * tensor.dtype.itemsize), 1)
        size = tensor.numel if has_state(tensor.entry) else step * tiles
        for first, count in ranges_left(tensor, cloned):
            for start in range(first, first + count, max(size, 1)):
                yield Task(tensor, start, min(size, first + count - start), step)
