"""The plan: for every output byte where it comes from, and what it costs. A value; opens nothing, decides nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.ops.contract import ReduceOp, TileOp
from shardmerge.targets.expectation import SideFile
from shardmerge.tensors import Extent, FileStamp, Shape, TensorEntry

# Version of the plan's JSON. It is part of the plan id.
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Read:
    """A source tensor, whole.

    Attributes
    ----------
    source
        The source's name in the mapping.
    entry
        What it is and where its bytes lie.
    """

    source: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes as they are."""

    read: Read


@dataclass(frozen=True, slots=True)
class Compute:
    """Element by element, any tile alone."""

    op: TileOp
    read: Read


@dataclass(frozen=True, slots=True)
class Reduce:
    """From the whole input, streamed once."""

    op: ReduceOp
    read: Read


Step: TypeAlias = Copy | Compute | Reduce


@dataclass(frozen=True, slots=True)
class Part:
    """Elements ``[start, start + count)`` of a target tensor, row-major, and the step that makes them.

    A ``Copy`` or ``Compute`` takes the first ``count`` elements of what it reads.
    """

    start: int
    count: int
    step: Step


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the output.

    Attributes
    ----------
    name, dtype, shape
        As they will stand in the header.
    parts
        In ascending order, tiling the tensor.
    rule
        ``file:line:col`` of the rule that asked for it, with its text.
    offset
        In bytes, from the start of its shard's file.
    """

    name: str
    dtype: DType
    shape: Shape
    parts: tuple[Part, ...]
    rule: str
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(part.count for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of weights.

    Attributes
    ----------
    name
        Base name.
    header
        The safetensors header, the 8 bytes of its length included; the data follows.
    tensors
        In the order of their data.
    """

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


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
class Memory:
    """What the run may need, in bytes; see ``execute.memory`` for the sum.

    Attributes
    ----------
    workers
        Threads that stream tiles.
    tile
        Bytes of a tile, on the larger side of a cast.
    peak
        Planned resident memory of the whole process at most.
    """

    workers: int
    tile: int
    peak: int


@dataclass(frozen=True, slots=True)
class Unused:
    """A source tensor that is not in the output, and why: dropped, shadowed or tied."""

    source: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
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
    memory
        Workers and peak; not part of the plan id, since they never change a byte.
    """

    target: str
    sources: tuple[PlannedSource, ...]
    shards: tuple[PlannedShard, ...]
    side_files: tuple[SideFile, ...]
    unused: tuple[Unused, ...]
    warnings: tuple[str, ...]
    memory: Memory

    def tensors(self) -> Iterator[PlannedTensor]:
        """Yields every tensor, shard by shard."""
        for shard in self.shards:
            yield from shard.tensors

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors: the index's ``total_size``."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files of the output directory, the receipt not included."""
        sides = sum(_length(part) for side in self.side_files for part in side.parts)
        return sum(shard.nbytes for shard in self.shards) + sides

    @property
    def id(self) -> str:
        """SHA-256 (hex) of the canonical JSON: equal inputs, equal id, on every machine."""
        text = json.dumps(canonical(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _length(part: bytes | Extent) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes


def bytes_read(tensor: PlannedTensor) -> int:
    """Returns the data bytes that making this tensor reads."""
    return sum(_part_bytes(part) for part in tensor.parts)


def _part_bytes(part: Part) -> int:
    entry = part.step.read.entry
    return entry.nbytes if isinstance(part.step, Reduce) else part.count * entry.dtype.itemsize


def canonical(plan: Plan) -> dict[str, object]:
    """Returns the plan as plain JSON values, without paths of this machine, times, workers or memory."""
    return {
        "schema": SCHEMA,
        "target": plan.target,
        "sources": [
            {"name": source.name, "kind": source.kind, "fingerprint": source.fingerprint} for source in plan.sources
        ],
        "shards": [_shard_json(shard) for shard in plan.shards],
        "side_files": [{"name": side.name, "parts": [_side_json(p) for p in side.parts]} for side in plan.side_files],
        "unused": sorted([unused.source, unused.name, unused.reason] for unused in plan.unused),
    }


def _side_json(part: bytes | Extent) -> object:
    if isinstance(part, bytes):
        return {"sha256": hashlib.sha256(part).hexdigest(), "nbytes": len(part)}
    return {"copied": part.nbytes, "from": part.offset}


def _shard_json(shard: PlannedShard) -> dict[str, object]:
    return {
        "name": shard.name,
        "header_nbytes": len(shard.header),
        "tensors": [_without_rule(tensor_json(tensor)) for tensor in shard.tensors],
    }


def _without_rule(tensor: dict[str, object]) -> dict[str, object]:
    """A comment added to the mapping moves its rules to other lines and changes no byte: the id does not know them."""
    return {key: value for key, value in tensor.items() if key != "rule"}


def tensor_json(tensor: PlannedTensor) -> dict[str, object]:
    """Returns one tensor of the plan as plain JSON values."""
    return {
        "name": tensor.name,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "nbytes": tensor.nbytes,
        "offset": tensor.offset,
        "rule": tensor.rule,
        "parts": [part_json(part) for part in tensor.parts],
    }


def part_json(part: Part) -> dict[str, object]:
    """Returns one part as plain JSON values."""
    return {
        "start": part.start,
        "count": part.count,
        "op": "copy" if isinstance(part.step, Copy) else part.step.op.label,
        "source": part.step.read.source,
        "tensor": part.step.read.entry.name,
        "dtype": part.step.read.entry.dtype.name,
        "origin": part.step.read.entry.origin,
    }
