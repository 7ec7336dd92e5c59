"""The plan: for every output byte where it comes from, and what it costs. A value; opens nothing, decides nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardmerge.dtypes import DType
from shardmerge.json_rows import Fields, Rows, canonical_text
from shardmerge.tensors import Extent, FileStamp, Made, Shape, SideFile, TensorEntry, View, composed

# Version of the plan's JSON. It is part of the plan id.
SCHEMA = 3


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the output.

    Attributes
    ----------
    name
        Of the target, group prefix included.
    entry
        What it is made of; its type and shape are those of the output.
    rule
        ``file:line:col`` of the rule that asked for it, with its text.
    stored
        Its name in the file.
    offset
        In bytes, from the start of its shard's file.
    """

    name: str
    entry: TensorEntry
    rule: str
    stored: str
    offset: int = 0

    @property
    def dtype(self) -> DType:
        """As in the header."""
        return self.entry.dtype

    @property
    def shape(self) -> Shape:
        """As in the header."""
        return self.entry.shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.entry.numel

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.entry.nbytes


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of weights.

    Attributes
    ----------
    name
        Path inside the output directory.
    nbytes
        Size of the file.
    blobs
        All bytes that are no tensor data, as (offset, bytes), ascending; the first is the header.
    tensors
        In the order of their data.
    checksums
        Where the CRC-32 of a tensor's bytes is to be written, by its name: fields of a torch file.
    """

    name: str
    nbytes: int
    blobs: tuple[tuple[int, bytes], ...]
    tensors: tuple[PlannedTensor, ...]
    checksums: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


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
    checks
        What was checked with another library; not part of the plan id.
    left_behind
        Small files beside the weights that are not written, by name, with the reason; not part of the plan id.
    memory
        Workers and peak; not part of the plan id, since they never change a byte.
    copies
        SHA-256 (hex) of every part of a side file that is copied from a source.
    side_sources
        Stamps of the side files of sources that were read or are copied.
    """

    target: str
    sources: tuple[PlannedSource, ...]
    shards: tuple[PlannedShard, ...]
    side_files: tuple[SideFile, ...]
    unused: tuple[Unused, ...]
    warnings: tuple[str, ...]
    memory: Memory
    copies: Mapping[Extent, str] = field(default_factory=dict)
    side_sources: tuple[FileStamp, ...] = ()
    left_behind: tuple[tuple[str, str], ...] = ()
    checks: tuple[str, ...] = ()
    _id: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def tensors(self) -> Iterator[PlannedTensor]:
        """Yields every tensor, shard by shard."""
        for shard in self.shards:
            yield from shard.tensors

    def files(self) -> Iterator[FileStamp]:
        """Yields the stamps of all files that the result depends on."""
        for source in self.sources:
            yield from source.files
        yield from self.side_sources

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
        """SHA-256 (hex) of the canonical JSON: equal inputs, equal id, on every machine. Made once."""
        if not self._id:
            digest = hashlib.sha256()
            for piece in canonical_text(canonical(self)):
                digest.update(piece.encode())
            self._id.append(digest.hexdigest())
        return self._id[0]


def _length(part: bytes | Extent) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes


def bytes_read(tensor: PlannedTensor) -> int:
    """Returns the data bytes that making this tensor reads once; an op that looks twice reads more."""
    return _read_bytes(tensor.entry)


def _read_bytes(entry: TensorEntry) -> int:
    held = composed(entry)
    if held is None:
        return entry.nbytes
    if isinstance(held, View):
        return min(entry.numel * held.base.dtype.itemsize, _read_bytes(held.base))
    return sum(_read_bytes(base) for base in held.bases)


def is_copy(entry: TensorEntry) -> bool:
    """Tells whether a tensor is bytes of the sources, moved and not changed."""
    held = composed(entry)
    return held is None or (not isinstance(held, Made) and all(is_copy(base) for base in held.bases))


def canonical(plan: Plan) -> Fields:
    """Returns the plan as JSON values, without paths of this machine, times, workers or memory."""
    return Fields(
        {
            "schema": SCHEMA,
            "target": plan.target,
            "sources": [
                {"name": source.name, "kind": source.kind, "fingerprint": source.fingerprint} for source in plan.sources
            ],
            "shards": Rows(lambda: map(_shard_json, plan.shards)),
            "side_files": [
                {"name": side.name, "parts": [_side_json(p, plan.copies) for p in side.parts]}
                for side in plan.side_files
            ],
            "unused": sorted([unused.source, unused.name, unused.reason] for unused in plan.unused),
        }
    )


def _side_json(part: bytes | Extent, copies: Mapping[Extent, str]) -> object:
    """The same for bytes made here and for the same bytes copied: nobody can tell them apart."""
    digest = hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else copies[part]
    return {"sha256": digest, "nbytes": _length(part)}


def _shard_json(shard: PlannedShard) -> Fields:
    tensors = Rows(lambda: map(_without_rule, shard.tensors))
    return Fields({"name": shard.name, "nbytes": shard.nbytes, "tensors": tensors})


def _without_rule(tensor: PlannedTensor) -> dict[str, object]:
    """A comment added to the mapping moves its rules to other lines and changes no byte: the id does not know them."""
    value = tensor_json(tensor)
    del value["rule"]
    return value


def tensor_json(tensor: PlannedTensor) -> dict[str, object]:
    """Returns one tensor of the plan as plain JSON values."""
    return {
        "name": tensor.name,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "nbytes": tensor.nbytes,
        "offset": tensor.offset,
        "rule": tensor.rule,
        "made": entry_json(tensor.entry),
    }


def entry_json(entry: TensorEntry) -> dict[str, object]:
    """Returns what a tensor is made of as plain JSON values: an op over others, or a tensor of a source."""
    held = composed(entry)
    if held is None:
        return {
            "source": entry.source,
            "tensor": entry.name,
            "dtype": entry.dtype.name,
            "shape": list(entry.shape),
            "origin": entry.origin,
        }
    return {"op": held.recipe.label, "of": [entry_json(base) for base in held.bases]}
