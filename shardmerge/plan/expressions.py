"""What a tensor is made of as JSON values, and back. Files and the tables of rank rules are numbered."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from shardmerge.dtypes import DTYPES, DType
from shardmerge.ops.contract import Op
from shardmerge.ops.written import op_of, op_row
from shardmerge.plan.json_values import Row, fields, listed, natural, naturals, text
from shardmerge.plan.soundness import check_entry
from shardmerge.tensors import (
    Box,
    Boxes,
    Columns,
    Extent,
    Held,
    Made,
    Piece,
    Strided,
    TensorEntry,
    View,
    composed,
    leaves,
)
from shardmerge.tensors.boxes import boxed
from shardmerge.tensors.ranks import Fragments, Partition, Partitions, RankChunks


class Tables:
    """Numbers the files and the tables of rank rules that rows of tensors name.

    Attributes
    ----------
    files
        Paths, each with its number.
    ranks
        The tables, by number.
    """

    def __init__(self, files: Iterable[str] = ()) -> None:
        self.files = {path: number for number, path in enumerate(dict.fromkeys(files))}
        self.ranks: list[Row] = []
        self._known: dict[
            tuple[int, int], tuple[int, object]
        ] = {}  # by identity of what is shared: so it is kept alive
        self._equal: dict[str, int] = {}

    def file(self, path: str) -> int:
        """Returns the number of a file, a new one if it has none."""
        return self.files.setdefault(path, len(self.files))

    def table(self, partitions: Partitions) -> int:
        """Returns the number of a table; equal tables have one."""
        if isinstance(partitions, Fragments):
            key = id(partitions.files), id(partitions.offsets)
        else:
            key = id(partitions), 0
        if key not in self._known:
            row = self._row(partitions)
            number = self._equal.setdefault(repr(row), len(self.ranks))
            self.ranks += [row] if number == len(self.ranks) else []
            self._known[key] = number, partitions
        return self._known[key][0]

    def collect(self, entries: Iterable[TensorEntry]) -> None:
        """Numbers every table that some tensors name."""
        for entry in entries:
            for leaf in leaves(entry):
                if isinstance(leaf.pieces, RankChunks):
                    self.table(leaf.pieces.partitions)

    def _row(self, partitions: Partitions) -> Row:
        if isinstance(partitions, Fragments):
            layouts = [tuple(row) for row in partitions.offsets]
            distinct = {row: number for number, row in enumerate(dict.fromkeys(layouts))}  # ranks mostly have one
            return {
                "files": [self.file(path) for path in partitions.files],
                "layouts": list(distinct),
                "layout": [distinct[row] for row in layouts],
            }
        extents = ((part.extent, part.numel) for part in partitions)
        return {"partitions": [[self.file(one.file), one.offset, one.nbytes, numel] for one, numel in extents]}


@dataclass(frozen=True, slots=True)
class _Frozen:
    """The fragments of frozen parameters: files by rank, and the offsets in each."""

    files: tuple[str, ...]
    offsets: tuple[array[int], ...]


class Lookup:
    """The files and tables of a plan that is read: the way back of ``Tables``."""

    def __init__(self, files: Sequence[str], ranks: Iterable[object] = ()) -> None:
        self._files = files
        self._ranks = [self._table(fields(row)) for row in ranks]

    def extent(self, file: object, offset: object, nbytes: int) -> Extent:
        """Returns an extent of a numbered file."""
        return Extent(self._files[natural(file)], natural(offset), nbytes)

    def chunks(self, row: Row, dtype: DType) -> RankChunks:
        """Returns the pieces that a rank rule says."""
        found = self._ranks[natural(row["ranks"])]
        if isinstance(found, _Frozen):
            index, numel = naturals(row["fragment"])
            table: Partitions = Fragments(found.files, found.offsets, index, numel, dtype.itemsize)
        else:
            table = found
        return RankChunks(table, dtype.itemsize, natural(row["start"]), natural(row["numel"]))

    def _table(self, row: Row) -> tuple[Partition, ...] | _Frozen:
        if "partitions" in row:
            parts = (naturals(one) for one in listed(row["partitions"]))
            return tuple(Partition(self.extent(file, at, nbytes), numel) for file, at, nbytes, numel in parts)
        layouts = [array("q", naturals(one)) for one in listed(row["layouts"])]
        files = tuple(self._files[number] for number in naturals(row["files"]))
        return _Frozen(files, tuple(layouts[number] for number in naturals(row["layout"])))


def entry_row(entry: TensorEntry, tables: Tables) -> Row:
    """Returns a tensor as JSON values; ``entry_of`` makes an equal one of them."""
    row: Row = {"dtype": entry.dtype.name, "shape": list(entry.shape)}
    row |= {key: value for key in ("name", "source", "origin") if (value := getattr(entry, key))}
    held = composed(entry)
    if held is not None:
        return row | _composed_row(held, tables)
    if isinstance(entry.pieces, RankChunks):
        return row | chunks_row(entry.pieces, tables)
    boxes = entry.pieces[0].held if entry.pieces else None
    if isinstance(boxes, Boxes):
        return row | {"boxes": [_box_row(box, tables) for box in boxes.boxes]}
    return row | {"pieces": [_piece_row(piece, tables) for piece in entry.pieces]}


def chunks_row(chunks: RankChunks, tables: Tables) -> Row:
    """Returns a rank rule as JSON values."""
    table = chunks.partitions
    row: Row = {"ranks": tables.table(table), "start": chunks.start, "numel": chunks.numel}
    return row | {"fragment": [table.index, table.numel]} if isinstance(table, Fragments) else row


def _composed_row(held: View | Columns | Made, tables: Tables) -> Row:
    assert isinstance(held.recipe, Op)  # what is planned is made by ops
    row: Row = {"by": op_row(held.recipe), "of": [entry_row(base, tables) for base in held.bases]}
    if isinstance(held, View):
        return {"view": [held.offset, list(held.shape), list(held.strides)], **row}
    return {"columns": held.rows, **row} if isinstance(held, Columns) else row


def _piece_row(piece: Piece, tables: Tables) -> list[object]:
    assert isinstance(piece.held, (Extent, Strided))
    return [piece.start, piece.count, *_place(piece.held, tables)]


def _box_row(box: Box, tables: Tables) -> list[object]:
    return [list(box.offsets), list(box.shape), *_place(box.held, tables)]


def _place(held: Extent | Strided, tables: Tables) -> list[object]:
    """Where dense elements begin; of a view also how much of the file it spans, and how."""
    if isinstance(held, Extent):
        return [tables.file(held.file), held.offset]
    extent = held.extent
    return [tables.file(extent.file), extent.offset, extent.nbytes, list(held.shape), list(held.strides)]


def entry_of(row: Row, lookup: Lookup) -> TensorEntry:
    """Returns the tensor that ``entry_row`` wrote.

    Raises
    ------
    ValueError, KeyError, IndexError, CheckpointError
        The values are not those of a tensor, or not of one that ``soundness`` lets pass.
    """
    dtype, shape = DTYPES[text(row["dtype"])], naturals(row["shape"])
    pieces: Sequence[Piece]
    if "by" in row:
        pieces = (Piece(0, prod(shape), _composed_of(row, lookup)),)
    elif "ranks" in row:
        pieces = lookup.chunks(row, dtype)
    elif "boxes" in row:
        pieces = boxed(dtype, shape, [_box_of(listed(one), dtype, lookup) for one in listed(row["boxes"])])
    else:
        pieces = tuple(_piece_of(listed(one), dtype, lookup) for one in listed(row["pieces"]))
    name, source, origin = (text(row.get(key, "")) for key in ("name", "source", "origin"))
    entry = TensorEntry(name, dtype, shape, pieces, origin, source)
    check_entry(entry)
    return entry


def _composed_of(row: Row, lookup: Lookup) -> Held:
    op, bases = op_of(fields(row["by"])), tuple(entry_of(fields(one), lookup) for one in listed(row["of"]))
    if "view" in row:
        offset, shape, strides = listed(row["view"])
        (base,) = bases
        return View(base, natural(offset), naturals(shape), naturals(strides), op)
    return Columns(bases, natural(row["columns"]), op) if "columns" in row else Made(bases, op)


def _piece_of(row: list[object], dtype: DType, lookup: Lookup) -> Piece:
    start, count, *place = row
    return Piece(natural(start), natural(count), _held(place, natural(count) * dtype.itemsize, lookup))


def _box_of(row: list[object], dtype: DType, lookup: Lookup) -> Box:
    offsets, shape, *place = row
    return Box(naturals(offsets), naturals(shape), _held(place, prod(naturals(shape)) * dtype.itemsize, lookup))


def _held(place: list[object], nbytes: int, lookup: Lookup) -> Extent | Strided:
    file, offset, *view = place
    if not view:
        return lookup.extent(file, offset, nbytes)
    span, shape, strides = view
    return Strided(lookup.extent(file, offset, natural(span)), naturals(shape), naturals(strides))
