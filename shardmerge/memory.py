"""The memory law: measured peak <= planned peak <= budget.

The planned peak is a sum of what is known before a byte is read:

    interpreter and libraries  +  the plan itself  +  workers x (input tile + output tile + op workspace)
"""

from __future__ import annotations

from collections.abc import Iterable

from shardmerge.errors import ResourceError
from shardmerge.ops.vocabulary import BLOCK_ROWS
from shardmerge.plan import Copy, Memory, Part, PlannedTensor, Reduce

# Resident after importing numpy, ml_dtypes, click, tqdm and PyYAML: 42 MiB measured (CPython 3.11, numpy 2.4); the rest
# is room for other versions and for parsing the mapping.
_RESERVED = 52 << 20

# A planned tensor with its entry, pieces, rule and header text: 1.7 to 2.2 KB measured, over 20,000 and 700 tensors.
_PER_TENSOR = 4 << 10

# fp32 to bf16 peaked at 49, 55, 67 and 91 MiB with tiles of 1, 2, 4 and 8 MiB and two workers (buffers resident; now
# they are not until used), and the times did not differ by more than the noise: large enough for windows, no larger.
LARGEST_TILE = 2 << 20
_SMALLEST_TILE = 64 << 10

# Most bytes that `execute.gather` reads at once for elements that lie apart.
STRIDED_WORKSPACE = 1 << 20


def plan_memory(tensors: Iterable[PlannedTensor], *, budget: int, workers: int) -> Memory:
    """Chooses the workers and the tile so that the planned peak stays within the budget.

    Parameters
    ----------
    tensors
        All of the plan.
    budget
        Most resident bytes of the whole process.
    workers
        Threads that stream tiles.

    Raises
    ------
    ResourceError
        ``memory-budget``: even the smallest tile does not fit, with the number and the tensor.
    """
    listed = list(tensors)
    fixed = _RESERVED + _PER_TENSOR * len(listed)
    widest, name = max(((_reduction(tensor), tensor.name) for tensor in listed), default=(0, ""))
    tile = LARGEST_TILE
    while tile >= _SMALLEST_TILE:
        peak = fixed + workers * max(_tile_peak(listed, tile), widest)
        if peak <= budget:
            return Memory(workers, tile, peak)
        tile //= 2
    least = fixed + workers * max(_tile_peak(listed, _SMALLEST_TILE), widest)
    raise ResourceError(
        "memory-budget",
        "the plan does not fit the memory budget",
        where=f"tensor {name}" if widest > _SMALLEST_TILE else "",
        found=f"{least:,} bytes needed with {workers} workers",
        expected=f"at most {budget:,} bytes",
        hint="allow more with --max-memory, or use fewer workers with --workers 1",
    )


def _tile_peak(tensors: list[PlannedTensor], tile: int) -> int:
    """Input and output of a tile, and the largest workspace any op of the plan asks for."""
    return (
        2 * tile
        + STRIDED_WORKSPACE
        + max((_workspace(part, tile) for tensor in tensors for part in tensor.parts), default=0)
    )


def _workspace(part: Part, tile: int) -> int:
    if isinstance(part.step, (Copy, Reduce)):
        return 0
    return part.step.op.workspace(tile // part.step.read.entry.dtype.itemsize)


def _reduction(tensor: PlannedTensor) -> int:
    return max((_reduce_bytes(part) for part in tensor.parts if isinstance(part.step, Reduce)), default=0)


def _reduce_bytes(part: Part) -> int:
    assert isinstance(part.step, Reduce)  # filtered by the caller
    entry = part.step.read.entry
    width = row_width(entry.shape)
    return part.step.op.workspace(width) + BLOCK_ROWS * width * entry.dtype.itemsize


def row_width(shape: tuple[int, ...]) -> int:
    """Returns the elements of one row (dim 0) of a shape; 1 for a 0-d tensor."""
    width = 1
    for size in shape[1:]:
        width *= size
    return width
