"""The order of tensors in a safetensors file, chosen so that as much as possible can be cloned. Pure.

The phase of a byte is its offset modulo the block of a file system. A tensor can be cloned where its phase in the
output is its phase in the source. The format allows no holes between tensors, so the phase of a tensor is that of the
data's start plus the sizes before it: free are where the data starts, by padding the header, and the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shardmerge.plan.clones import BLOCK, SMALLEST, inner_blocks, whole_extent
from shardmerge.plan.shard import PlannedTensor
from shardmerge.tensors import Extent

# What the format wants the start of the data to be a multiple of.
_DATA_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The order of the data of a file.

    Attributes
    ----------
    tensors
        In the order of their data, each at a multiple of its item size.
    phase
        Of the first byte of the data: a multiple of 8 below ``BLOCK``.
    """

    tensors: tuple[PlannedTensor, ...]
    phase: int


@dataclass(slots=True)
class _Run:
    """Tensors that lie one behind the other in one file."""

    extent: Extent
    tensors: list[PlannedTensor]

    @property
    def phase(self) -> int:
        return self.extent.offset % BLOCK

    @property
    def pays(self) -> bool:
        return inner_blocks(self.extent.offset, self.extent.nbytes)[1] >= SMALLEST

    @property
    def ragged(self) -> bool:
        return self.extent.nbytes % BLOCK != 0


def arrange(tensors: Sequence[PlannedTensor]) -> Arrangement:
    """Returns the order: first runs of the sources at their own phase, then all else, larger element types first.

    Without runs that pay, the data starts on a block and larger element types come first, the order of the reference
    writer: every tensor is then aligned to its own type. What a file system can do has no say: a plan is the same
    everywhere.

    Parameters
    ----------
    tensors
        Of one file, in natural order.
    """
    by_size = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    chain = _chain([run for run in _runs(tensors) if run.pays])
    phase = chain[0].phase if chain else 0
    placed = _aligned([tensor for run in chain for tensor in run.tensors], phase, by_size)
    if not placed:
        return Arrangement(tuple(by_size), 0)
    names = {tensor.name for tensor in placed}
    return Arrangement((*placed, *(tensor for tensor in by_size if tensor.name not in names)), phase)


def by_source(tensors: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
    """Returns the parts in which files are filled: what can be cloned from one source file stays together.

    A file has room for one phase as a rule, so of two sources in it one is copied: renaming an 8B in four files, cut at
    5 GB in natural order, cloned 79 % of the bytes. A tensor that is in no run that pays follows the one before it.
    Without such runs, or with one source file, there is one part.

    Parameters
    ----------
    tensors
        In natural order, and so is every part.
    """
    files = {tensor.name: run.extent.file for run in _runs(tensors) if run.pays for tensor in run.tensors}
    last = next((files[tensor.name] for tensor in tensors if tensor.name in files), "")
    parts: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        last = files.get(tensor.name, last)
        parts.setdefault(last, []).append(tensor)
    return list(parts.values())


def _runs(tensors: Iterable[PlannedTensor]) -> list[_Run]:
    """Returns the runs of all files, by file (the one that is met first comes first) and place."""
    extents = [(tensor, extent) for tensor in tensors if (extent := whole_extent(tensor.entry)) is not None]
    ranks = {file: rank for rank, file in enumerate(dict.fromkeys(extent.file for _, extent in extents))}
    aligned = [(tensor, extent) for tensor, extent in extents if not extent.offset % tensor.dtype.itemsize]
    aligned.sort(key=lambda pair: (ranks[pair[1].file], pair[1].offset))
    runs: list[_Run] = []
    for tensor, extent in aligned:
        before = runs[-1].extent if runs else None
        if before is not None and (extent.file, extent.offset) == (before.file, before.offset + before.nbytes):
            runs[-1].extent = replace(before, nbytes=before.nbytes + extent.nbytes)
            runs[-1].tensors.append(tensor)
        else:
            runs.append(_Run(extent, [tensor]))
    return runs


def _chain(runs: Sequence[_Run]) -> list[_Run]:
    """Returns runs that keep their phases one behind the other, from the phase that holds most bytes on.

    A run of whole blocks leaves the phase as it is, so those of a phase come first; of the others one can follow, the
    longest, and it leads to another phase.
    """
    waiting: dict[int, list[_Run]] = {}
    for run in sorted(runs, key=lambda run: (run.ragged, -run.extent.nbytes if run.ragged else 0)):
        waiting.setdefault(run.phase, []).append(run)
    totals = {phase: sum(run.extent.nbytes for run in found) for phase, found in waiting.items()}
    state = max((phase for phase in totals if phase % _DATA_ALIGNMENT == 0), key=totals.__getitem__, default=0)
    chain: list[_Run] = []
    while waiting.get(state):
        run = waiting[state].pop(0)
        chain.append(run)
        state = (state + run.extent.nbytes) % BLOCK
    return chain


def _aligned(placed: list[PlannedTensor], phase: int, every: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """Drops tensors from the end until those that are not placed can follow, the largest element type first."""
    names = {tensor.name for tensor in placed}
    unit = max((tensor.dtype.itemsize for tensor in every if tensor.name not in names), default=1)
    cursor = phase + sum(tensor.nbytes for tensor in placed)
    while placed and cursor % unit:
        last = placed.pop()
        cursor -= last.nbytes
        unit = max(unit, last.dtype.itemsize)
    return placed
