"""How a plan is carried out with what is granted: processes, threads, tiles, and who makes which part. Pure.

Nothing here changes a byte of the result. The memory law: measured peak <= planned peak <= budget, of all processes
together. The planned peak is a sum of what is known before a byte is read:

    interpreter and libraries  +  headers and the plan itself  +  what each process has of its own
        +  threads of all processes x (a tile of output + what making it allocates)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import ResourceError
from shardmerge.plan.memory import LARGEST_TILE, READ_BACK, making_peak
from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.tensors import leaves

# Resident before the first tile, with numpy, ml_dtypes, click and PyYAML: 42 MiB measured without a mapping, 45 with
# one (CPython 3.11, numpy 2.4); zlib-ng and numkong, which come with the first tile and the first cast, take 3 more.
# The rest is room for other versions.
_RESERVED = 53 << 20

# A tensor of a source with its pieces, what is planned of it, its header and its part of the receipt: 1.9 KB of a whole
# run measured, over 92,000 tensors with a cast each.
_PER_TENSOR = 2 << 10

# The SHA-256 of a tensor: where it is taken, in the receipt of its part, and in that of the result.
_PER_DIGEST = 512

# What a process forked from the one that planned has of its own beside its threads' buffers: pages that both wrote to
# (counts of references), allocator, stacks.
_PER_PROCESS = 12 << 20

# Writers of one file wait for each other at its inode: four are as fast as sixteen (16 cores, fp32 to bf16: 1.03 s with
# four, 1.25 with sixteen; a file each 0.45 in threads, 0.32 in processes).
_MOST_THREADS = 4

# A smaller result is made by one process: starting others takes as long as half of it.
_WORTH_PROCESSES = 256 << 20

# Bytes of all workers' tiles together, and the largest tile of more than four.
_TILES_TOGETHER = 8 << 20
_LARGEST_OF_MANY = 1 << 20
_SMALLEST_TILE = 64 << 10


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a plan is carried out on one machine.

    Attributes
    ----------
    processes
        How many make parts side by side; 1 is this one.
    threads
        In each process, that stream tiles of one part.
    tile
        Bytes of a tile, on the larger side of a cast.
    peak
        Planned resident memory of all processes at most, in bytes; pages that they share count once.
    apart
        Whether even a single one is not this process: who reads a map of a file that shrinks is ended by the system.
    """

    processes: int
    threads: int
    tile: int
    peak: int
    apart: bool = False

    @property
    def workers(self) -> int:
        """Threads of all processes."""
        return self.processes * self.threads


def schedule(  # noqa: PLR0913  # what is made, and what is granted
    shards: Sequence[PlannedShard],
    *,
    budget: int,
    workers: int,
    processes: int = 64,
    frames: int = 0,
    opening: int = 0,
    apart: bool = False,
    sha256: bool = False,
) -> Schedule:
    """Returns the most workers, and the largest tile, with which the planned peak stays within the budget.

    Parameters
    ----------
    shards
        What is to be made: all of a plan, or some of its parts.
    budget
        Most resident bytes of all processes.
    workers
        CPUs to be used; fewer are where so many do not fit, or find no work.
    processes
        Most of them; 1 where nothing may be forked.
    frames
        What each worker keeps to unpack compressed files, in bytes: see ``memory.unpacking_peak``.
    opening
        What planning leaves besides, in bytes: see ``memory.opening_peak`` and ``memory.target_peak``.
    apart
        As ``Schedule.apart``.
    sha256
        Whether digests are taken.

    Raises
    ------
    ResourceError
        ``memory-budget``: even the smallest tile does not fit, with the number and the tensor.
    """
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    fixed = _RESERVED + opening + _PER_TENSOR * sum(max(sum(1 for _ in leaves(tensor.entry)), 1) for tensor in tensors)
    fixed += _PER_DIGEST * len(tensors) if sha256 else 0
    needs: dict[int, int] = {}  # of a worker, by tile: asked for again with fewer workers
    for count, threads in _ways(shards, workers, processes):
        tile = _first_tile(count * threads)
        while tile >= _SMALLEST_TILE:
            if tile not in needs:
                needs[tile] = max((making_peak(tensor.entry, tile) for tensor in tensors), default=0) + frames
            peak = fixed + _own(count, apart=apart, sha256=sha256) + count * threads * needs[tile]
            if peak <= budget:
                return Schedule(count, threads, tile, peak, apart)
            tile //= 2
    if not tensors:  # nothing to be made: what was made before is looked at, and published
        return Schedule(1, 1, _SMALLEST_TILE, fixed)
    raise _too_small(tensors, fixed + frames + _own(1, apart=apart, sha256=sha256), budget)


def _own(processes: int, *, apart: bool, sha256: bool) -> int:
    """Returns what so many processes have of their own beside the tiles of their threads, in bytes."""
    forked = processes if processes > 1 or apart else 0
    return _PER_PROCESS * forked + (READ_BACK * processes if sha256 else 0)


def _ways(shards: Sequence[PlannedShard], workers: int, most: int) -> Iterator[tuple[int, int]]:
    """Yields (processes, threads in each), those with most workers first, and of these those with most processes."""
    worth = sum(shard.nbytes for shard in shards) >= _WORTH_PROCESSES
    most = min(most, workers, len(shards)) if worth else 1
    ways = [(p, t) for p in range(1, most + 1) for t in range(1, _MOST_THREADS + 1) if p * t <= workers]
    yield from sorted(ways, key=lambda way: (-way[0] * way[1], -way[0]))


def _first_tile(workers: int) -> int:
    """Returns the tile that is tried first, a power of two."""
    share = 1 << max(_TILES_TOGETHER // workers, 1).bit_length() - 1
    return max(min(share, LARGEST_TILE), _LARGEST_OF_MANY)


def _too_small(tensors: Iterable[PlannedTensor], fixed: int, budget: int) -> ResourceError:
    least, name = max((making_peak(tensor.entry, _SMALLEST_TILE), tensor.name) for tensor in tensors)
    return ResourceError(
        "memory-budget",
        "the plan does not fit the memory budget",
        where=f"tensor {name}" if least > 32 * _SMALLEST_TILE else "",  # 2 MiB: more than any cast needs
        found=f"{fixed + least:,} bytes needed with 1 worker",
        expected=f"at most {budget:,} bytes",
        hint=f"allow more: --max-memory {-(-(fixed + least) // (1 << 20))}MiB",
    )


def largest_first(sizes: Sequence[int]) -> list[int]:
    """Returns the numbers of parts in the order in which they are made: a large one begun last is waited for."""
    return sorted(range(len(sizes)), key=lambda number: (-sizes[number], number))


def share(sizes: Sequence[int], index: int, count: int) -> list[int]:
    """Returns the parts that task ``index`` of ``count`` makes: each part goes to the task that has least so far.

    The same for everybody who asks, so that tasks need not speak with each other.

    Parameters
    ----------
    sizes
        Of all parts, in bytes, by number.
    index, count
        Which task, from 0, of how many.
    """
    loads = [(0, task) for task in range(count)]
    found = []
    for number in largest_first(sizes):
        load, task = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[number], task))
        found += [number] if task == index else []
    return found


# How many times as long as others take for its size somebody is at work on a part before it is made again elsewhere.
# 1,000 equal parts, 64 workers, one in ten four times slower: the last part is ready at 1.20 of the ideal time without
# that, at 1.14 with 2, 1.11 with 1.5, 1.09 with 1.2; 1.0 gives 1.08, and makes 37 parts twice instead of six
# (``python -m benchmarks.stragglers``).
_LATE = 1.5


def late_part(under_way: Mapping[int, float], sizes: Sequence[int], pace: float, own: float) -> int | None:
    """Returns a part that is worth making again, since whoever has it is slow; None where there is none.

    Parameters
    ----------
    under_way
        For how many seconds each part that is not made has been under way.
    sizes
        Of all parts, in bytes, by number.
    pace, own
        Seconds a byte, of most makers and of the one who asks: who is slow himself helps nobody.
    """
    if own > _LATE * pace:
        return None
    overdue = {number: seconds - _LATE * pace * sizes[number] for number, seconds in under_way.items()}
    late = max(overdue, key=overdue.__getitem__, default=None)
    return late if late is not None and overdue[late] > 0 else None
