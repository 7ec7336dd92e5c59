"""A tensor and where its bytes lie.

A checkpoint of any format becomes a ``Catalog`` of ``TensorEntry``; an entry is a dtype, a shape and ``Piece`` s that
tile the tensor's row-major order exactly once, each held by an ``Extent`` of a file, by a ``Strided`` view of one, or
by ``Boxes``, which lie in an extent or a view each. A tensor made of other tensors is an entry too: its one piece is a
``View`` of another entry, ``Columns`` of several, or ``Made`` by arithmetic. So a whole expression is one entry, and
whoever can read an entry can read the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Protocol, TypeAlias

from shardmerge.dtypes import DType

Shape: TypeAlias = tuple[int, ...]


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
class Box:
    """A part of a tensor, cut along any axes, and what holds it: a chunk of torch's DCP, a shard of tensor parallelism.

    Attributes
    ----------
    offsets
        Its first element, an index an axis.
    shape
        In elements, an axis each.
    held
        Its elements in row-major order; a view of the same shape where they lie in another.
    """

    offsets: tuple[int, ...]
    shape: Shape
    held: Extent | Strided


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes that tile a tensor exactly once; ``boxes.boxed`` makes them and sees to that.

    Attributes
    ----------
    shape
        What they tile.
    boxes
        In ascending order of their offsets.
    row
        Elements of the tensor from one step to the next of the axis before the innermost one that is cut: what several
        boxes share.
    run
        How many elements of a row one box holds, on the average.
    view
        One of them that is a view, if any is.
    """

    shape: Shape
    boxes: tuple[Box, ...]
    row: int = field(init=False, repr=False, compare=False)
    run: int = field(init=False, repr=False, compare=False)
    view: Strided | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        axes = range(len(self.shape))
        cut = max((i for box in self.boxes for i in axes if box.shape[i] != self.shape[i]), default=0)
        runs = sum(prod(box.shape[:cut]) for box in self.boxes)
        views = (box.held for box in self.boxes if isinstance(box.held, Strided))
        object.__setattr__(self, "row", prod(self.shape[cut:]))
        object.__setattr__(self, "run", prod(self.shape) // max(runs, 1))
        object.__setattr__(self, "view", next(views, None))


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

    @property
    def like(self) -> int:
        """Which input's type the result keeps where nobody asks for another."""

    def words(self, inputs: Sequence[TensorEntry]) -> str:
        """What it does, for people; empty where types tell all of it."""


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
Held: TypeAlias = Extent | Strided | Boxes | Composed


@dataclass(frozen=True, slots=True, repr=False)
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

    def __repr__(self) -> str:
        pieces = f"{len(self.pieces):,} piece{'' if len(self.pieces) == 1 else 's'}"
        return f"TensorEntry({self.name!r}, {self.dtype} {list(self.shape)}, {self.origin!r}, {pieces})"

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
