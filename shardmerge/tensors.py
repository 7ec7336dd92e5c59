"""What a tensor is and where its bytes lie. Opens no files.

A checkpoint of any format becomes a ``Catalog`` of ``TensorEntry``; an entry is a dtype, a shape and ``Piece`` s that
tile the tensor's row-major order exactly once, each held by an ``Extent`` of a file, or by a ``Strided`` view of one.
A tensor made of other tensors is an entry too: its one piece is a ``View`` of another entry, ``Columns`` of several, or
``Made`` by arithmetic. So a whole expression is one entry, and whoever can read an entry can read the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from os import stat_result
from typing import NamedTuple, Protocol, TypeAlias

from shardmerge.dtypes import DType
from shardmerge.json_rows import Rows, canonical_text

Shape: TypeAlias = tuple[int, ...]
Fact: TypeAlias = "int | float | str | bool"

# The kind of a catalog of adapter weights, which say nothing without the base they change.
PEFT_ADAPTER = "PEFT adapter"


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes ``[offset, offset + nbytes)`` of a file; opens nothing.

    Attributes
    ----------
    file
        Absolute path.
    offset, nbytes
        In bytes.
    """

    file: str
    offset: int
    nbytes: int

    def slice(self, start: int, nbytes: int) -> Extent:
        """Returns ``nbytes`` of this extent from its byte ``start`` on."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise ValueError(f"slice [{start}, {start + nbytes}) of an extent of {self.nbytes} bytes")
        return Extent(self.file, self.offset + start, nbytes)


@dataclass(frozen=True, slots=True)
class Strided:
    """A non-contiguous view of an extent, as torch saves a transposed, expanded or sliced tensor.

    Attributes
    ----------
    extent
        From the view's first element to its last, nothing more.
    shape, strides
        In elements, as in ``torch.Tensor.stride()``; strides are never negative (torch has no negative strides).
    """

    extent: Extent
    shape: Shape
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``[start, start + count)`` of a tensor in row-major order, and what holds them."""

    start: int
    count: int
    held: Held


class Recipe(Protocol):
    """What makes elements of other elements; ``ops.contract`` says the rest."""

    @property
    def label(self) -> str:
        """How the plan calls it."""


@dataclass(frozen=True, slots=True)
class View:
    """Elements of another tensor, some of them or in another order: ``torch.as_strided`` over its row-major elements.

    Attributes
    ----------
    base
        The other tensor.
    offset
        Its first element that is seen.
    shape, strides
        In elements, strides never negative. The row-major order of ``shape`` is that of the tensor so held.
    recipe
        The op that asked for it.
    """

    base: TensorEntry
    offset: int
    shape: Shape
    strides: tuple[int, ...]
    recipe: Recipe

    @property
    def bases(self) -> tuple[TensorEntry, ...]:
        """What it is made of."""
        return (self.base,)


@dataclass(frozen=True, slots=True)
class Columns:
    """Tensors side by side: each is ``[rows, numel / rows]``, and row i is row i of all of them, in order."""

    bases: tuple[TensorEntry, ...]
    rows: int
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Made:
    """Computed from other tensors."""

    bases: tuple[TensorEntry, ...]
    recipe: Recipe


Composed: TypeAlias = View | Columns | Made
Held: TypeAlias = Extent | Strided | Composed


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that a checkpoint holds.

    Attributes
    ----------
    name
        Its key in the state dict.
    dtype, shape
        As stored, before any cast.
    pieces
        A sequence, possibly computed on demand (a 1,024-rank model must not cost a million objects), in ascending
        order of ``start``, without gaps or overlaps. Empty for a tensor without elements.
    origin
        Where in the checkpoint it was found, for people: ``"fp32 partitions"``, ``"frozen fragments"``, ...
    source
        Name of its source in the mapping, once it is known.
    """

    name: str
    dtype: DType
    shape: Shape
    pieces: Sequence[Piece]
    origin: str = ""
    source: str = ""

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes, dense."""
        return self.numel * self.dtype.itemsize


def of_source(entry: TensorEntry, source: str) -> TensorEntry:
    """Returns the entry marked with the name of its source in the mapping."""
    return entry if entry.source == source else replace(entry, source=source)


def composed(entry: TensorEntry) -> Composed | None:
    """Returns what a tensor is made of, or None for one that lies in files (or has no elements)."""
    held = entry.pieces[0].held if entry.pieces else None
    return held if isinstance(held, (View, Columns, Made)) else None


def leaves(entry: TensorEntry) -> Iterator[TensorEntry]:
    """Yields the tensors of checkpoints that an entry is made of, the entry itself if it is one."""
    held = composed(entry)
    if held is None:
        if entry.name:
            yield entry
        return
    for base in held.bases:
        yield from leaves(base)


def dense(extent: Extent, numel: int) -> tuple[Piece, ...]:
    """Returns the pieces of a tensor that lies whole and contiguous in one extent."""
    return (Piece(0, numel, extent),) if numel else ()


class Record(NamedTuple):
    """Bytes of a file that have a checksum there: a storage of a torch zip.

    Attributes
    ----------
    name
        In the archive.
    offset, nbytes
        Where they lie, in bytes.
    crc32
        As the archive says; 0 where it was written without.
    """

    name: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What pins a source file between planning and reading.

    Attributes
    ----------
    path
        Absolute path.
    size, mtime_ns
        From ``stat``.
    header
        SHA-256 (hex) of the bytes that were parsed: safetensors header, ``data.pkl``; empty where none were.
    device, inode, ctime_ns
        From ``stat``: a file put in the place of another, with its size and time of modification, differs here.
    """

    path: str
    size: int
    mtime_ns: int
    header: str = ""
    device: int = 0
    inode: int = 0
    ctime_ns: int = 0

    @classmethod
    def of(cls, path: str, status: stat_result, header: bytes = b"") -> FileStamp:
        """Returns the stamp of a file from its ``stat`` and the bytes that were parsed, if any."""
        digest = hashlib.sha256(header).hexdigest() if header else ""
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(path, status.st_size, times[0], digest, status.st_dev, status.st_ino, times[1])


@dataclass(frozen=True, slots=True)
class Catalog:
    """A checkpoint, reduced to what its headers say.

    Attributes
    ----------
    path
        What the user named, resolved.
    kind
        The format, for people and JSON: ``"safetensors"``, ``"torch zip"``, ``"DeepSpeed ZeRO-2"``, ...
    entries
        By name, in the checkpoint's order.
    aliases
        Tied names: alias -> the entry that owns the bytes.
    files
        Every file that was opened.
    side_files
        Small files beside the weights (config.json, tokenizer files), by base name, each as one extent.
    absent
        Names that the checkpoint lists with no data (placeholders of ZeRO-3).
    elsewhere
        Paths of checkpoints beside this one that hold weights, where it lacks some: a ZeRO tag directory beside a model
        with placeholders, the ``checkpoint-N`` of a directory that has a config and no weights.
    notes
        What a user may want to know and what changes no value: a total_size that disagrees, the rank files read.
    warnings
        What decides which values come out: the view chosen for want of another, placeholders left out, tensors that are
        not part of the model. Shown with every plan and result, on stderr also under ``-q``, and kept in the receipt.
    training_config
        Text of the training config carried in the file (mmengine ``meta["cfg"]``), or ``""``. Never executed.
    facts
        Plain values that the training run left beside the weights, by name: the scalars of Megatron's ``args``
        (``num_attention_heads``, ``tensor_model_parallel_size``, ...). Not in the fingerprint.
    quantized
        What the files beside the weights say they are quantized by (``fp8``, ``gptq``, ...), or ``""``; known once
        ``dequantizing`` has looked.
    dequantized
        Whether that no longer holds: the weights are numbers, and no config may say otherwise.
    """

    path: str
    kind: str
    entries: Mapping[str, TensorEntry]
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: tuple[FileStamp, ...] = ()
    side_files: Mapping[str, Extent] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    elsewhere: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    training_config: str = ""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    quantized: str = ""
    dequantized: bool = False

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self.aliases

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[self.aliases.get(name, name)]

    def names(self) -> Iterator[str]:
        """Yields every name, aliases after the entries."""
        yield from self.entries
        yield from self.aliases

    def fingerprint(self) -> str:
        """Returns a SHA-256 (hex) over names, dtypes, shapes, aliases and the files' sizes and headers.

        Paths and times stay out: a copy of a checkpoint has the fingerprint of the original.
        """
        tensors = ([entry.name, entry.dtype.name, entry.shape] for entry in self.entries.values())
        files = sorted([stamp.size, stamp.header] for stamp in self.files)
        digest = hashlib.sha256()
        for piece in canonical_text(
            Rows(lambda: iter([self.kind, Rows(lambda: tensors), sorted(self.aliases.items()), files]))
        ):
            digest.update(piece.encode())
        return digest.hexdigest()
