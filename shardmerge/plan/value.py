"""The plan: all that execution needs to know. A value; opens nothing, decides nothing.

It is closed: what is not in it, nobody who carries it out looks up. ``plan.text`` writes it down and reads it back;
``plan.identity`` says what of it decides the bytes. How it is carried out, by how many workers in how much memory,
follows from it and from what is granted (``plan.schedule``), and changes no byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.shown import Displayed
from shardmerge.tensors import Extent, FileStamp, SideFile


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """A source as the plan saw it.

    Attributes
    ----------
    name
        In the mapping.
    path
        As the user wrote it.
    kind, fingerprint
        From its catalog.
    files
        Stamps to compare with before and after reading.
    notes
        What the user should know about it.
    """

    name: str
    path: str
    kind: str
    fingerprint: str
    files: tuple[FileStamp, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unused:
    """A source tensor that is not in the output, and why: dropped, shadowed or tied."""

    source: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Part:
    """One output file of a plan: what one process makes at a time, and commits by a receipt.

    Attributes
    ----------
    plan
        Id of the plan.
    number
        Of the file in the plan's order, from 0.
    shard
        What to make.
    files
        Stamps of all files that the plan's result depends on, in the order of the plan's file table.
    """

    plan: str
    number: int
    shard: PlannedShard
    files: tuple[FileStamp, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Plan(Displayed):
    """Everything execution needs to know.

    Attributes
    ----------
    target
        Name of the target, e.g. ``hf/llava``.
    sources, shards, side_files
        Inputs and outputs. ``side_files`` includes the index where there is more than one shard.
    unused
        Source tensors that are not written.
    warnings
        To be shown, stopping nothing.
    copies
        SHA-256 (hex) of every part of a side file that is copied from a source.
    side_sources
        Stamps of the side files of sources that were read or are copied.
    left_behind
        Small files beside the weights that are not written, by name, with the reason.
    checks
        What was checked with another library.
    """

    target: str
    sources: tuple[PlannedSource, ...]
    shards: tuple[PlannedShard, ...]
    side_files: tuple[SideFile, ...]
    unused: tuple[Unused, ...]
    warnings: tuple[str, ...]
    copies: Mapping[Extent, str] = field(default_factory=dict)
    side_sources: tuple[FileStamp, ...] = ()
    left_behind: tuple[tuple[str, str], ...] = ()
    checks: tuple[str, ...] = ()
    _id: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def tensors(self) -> Iterator[PlannedTensor]:
        """Yields every tensor, shard by shard."""
        for shard in self.shards:
            yield from shard.tensors

    def files(self) -> tuple[FileStamp, ...]:
        """Returns the file table: the stamps of all files that the result depends on, each once."""
        stamps = (*(stamp for source in self.sources for stamp in source.files), *self.side_sources)
        return tuple({stamp.path: stamp for stamp in stamps}.values())

    def parts(self) -> tuple[Part, ...]:
        """Returns the parts, in the order of their numbers."""
        files = self.files()
        return tuple(Part(self.id, number, shard, files) for number, shard in enumerate(self.shards))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors: the index's ``total_size``."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files of the output directory, the receipt not included."""
        sides = sum(side.nbytes for side in self.side_files)
        return sum(shard.nbytes for shard in self.shards) + sides

    @property
    def id(self) -> str:
        """SHA-256 (hex) of what decides the bytes of the result: see ``plan.identity``. Made once."""
        if not self._id:
            from shardmerge.plan.identity import identity  # `inspect` makes no plan

            self._id.append(identity(self.shards, self.side_files, self.copies, self.files()))
        return self._id[0]

    def known_as(self, plan_id: str) -> Plan:
        """Returns this plan with the id that it had before its files were moved to other paths."""
        self._id[:] = [plan_id]
        return self
