"""Small plans out of entries, as the planner lays them out; their text; and the bytes of what comes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import shardmerge as sm
from shardmerge.dtypes import DTYPES, DType
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.plan.reading import PlanText
from shardmerge.plan.shard import PlannedTensor
from shardmerge.plan.shards import lay_out
from shardmerge.plan.value import Plan, PlannedSource
from shardmerge.plan.writing import plan_lines
from shardmerge.publish.running import carry_out
from shardmerge.tensors import Extent, FileStamp, Piece, SideFile, Strided, TensorEntry, dense, leaves
from shardmerge.tensors.boxes import Box, boxed
from shardmerge.tensors.ranks import Fragments, Partition, RankChunks, chunk_numel

DTYPE_OF = {numpy_dtype(row): row for row in DTYPES.values()}

# Seconds and some nanoseconds: a time as a kernel writes it.
TIME = 1_700_000_000_123_456_789


def files_of(entries: Iterable[TensorEntry]) -> tuple[FileStamp, ...]:
    """Returns the stamps of all files that some tensors read."""
    paths: dict[str, None] = {}
    for entry in entries:
        for leaf in leaves(entry):
            for piece in leaf.pieces:
                held = piece.held
                for one in getattr(held, "boxes", ()) or (piece,):
                    extent = one.held if isinstance(one.held, Extent) else one.held.extent
                    paths[extent.file] = None
    return tuple(FileStamp.of(path, Path(path).stat()) for path in paths)


def planned(
    entries: Mapping[str, TensorEntry],
    sides: tuple[SideFile, ...] = (),
    *,
    size: int = 1 << 30,
    form: str = "safetensors",
) -> Plan:
    """Returns the plan that makes entries, as the planner lays them out."""
    tensors = [PlannedTensor(name, entry, "mapping.yaml:1:1 {rest...}", name) for name, entry in entries.items()]
    shards, indexes = lay_out(tensors, size, form=form)
    source = PlannedSource("src", "model", "safetensors", "f" * 64, files_of(entries.values()), ("a note",))
    return Plan("hf/model", (source,), shards, (*sides, *indexes), (), ())


def text(plan: Plan, out: str = "") -> str:
    """Returns a plan as it is written."""
    return "".join(plan_lines(plan, out))


def again(plan: Plan) -> Plan:
    """Returns a plan read from its text."""
    return PlanText(text(plan).splitlines(keepends=True), "plan.json").plan()


def signed(lines: list[str]) -> list[str]:
    """Returns the lines of a plan, but for the last, with the digest that is right for them."""
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return [*lines, f'"sha256": "{digest}"}}\n']


def result(plan: Plan, out: Path, **options: object) -> dict[str, bytes]:
    """Carries out a plan and returns all files but the receipt, which names what the plan is made of."""
    carry_out(plan, out, sm.Options(sync=False, **options))
    return contents(out, "shardmerge.json")


def contents(folder: Path, *but: str) -> dict[str, bytes]:
    """Returns the bytes of all files of a directory, by their path in it."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


class Store:
    """Puts arrays into files of a folder, in each of the ways that checkpoints do."""

    WAYS = ("whole", "pieces", "strided", "boxes", "ranks", "frozen")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def put(self, array: Array, way: str = "whole", name: str = "t") -> TensorEntry:
        """Returns an entry that holds an array, one of ``WAYS``."""
        flat = array.reshape(-1)
        pieces = getattr(self, f"_{way}")(array, flat) if array.size else ()
        return TensorEntry(name, self.dtype(array), array.shape, pieces, "file", "src")

    @staticmethod
    def dtype(array: Array) -> DType:
        return DTYPE_OF[array.dtype]

    def extent(self, data: bytes) -> Extent:
        """Returns where some bytes lie in a file of their own, at an odd offset."""
        self._count += 1
        path = self.folder / f"data{self._count}"
        path.write_bytes(bytes(self._count) + data)
        return Extent(str(path), self._count, len(data))

    def _whole(self, array: Array, flat: Array) -> tuple[Piece, ...]:
        return dense(self.extent(flat.tobytes()), array.size)

    def _pieces(self, array: Array, flat: Array) -> tuple[Piece, ...]:
        """Three, at places that are no ends of rows, in files in another order."""
        bounds = sorted({0, flat.size // 3, flat.size // 2 + 1, flat.size} & set(range(flat.size + 1)))
        parts = [(low, high) for low, high in pairwise(bounds) if high > low]
        held = {low: self.extent(flat[low:high].tobytes()) for low, high in reversed(parts)}
        return tuple(Piece(low, high - low, held[low]) for low, high in parts)

    def _strided(self, array: Array, flat: Array) -> tuple[Piece, ...]:
        """As torch saves a view: with all axes turned around, in the middle of what it is a view of."""
        turned = array.transpose().copy()
        strides = tuple(step // array.itemsize for step in turned.transpose().strides)
        return (Piece(0, array.size, Strided(self.extent(turned.tobytes()), array.shape, strides)),)

    def _boxes(self, array: Array, flat: Array) -> tuple[Piece, ...]:
        """Cut in the middle of the last axis, and of the first where it has two."""
        cuts = [
            (0, n // 2, n) if axis in (0, array.ndim - 1) and n > 1 else (0, n) for axis, n in enumerate(array.shape)
        ]
        found = [((), ())]
        for cut in cuts:
            found = [((*at, low), (*to, high)) for at, to in found for low, high in pairwise(cut)]
        boxes = []
        for at, to in found:
            part = array[tuple(slice(low, high) for low, high in zip(at, to, strict=True))]
            boxes.append(Box(at, part.shape, self.extent(part.tobytes())))
        return boxed(self.dtype(array), array.shape, boxes)

    def _ranks(self, array: Array, flat: Array, world: int = 3) -> RankChunks:
        """As ZeRO-3 cuts a parameter, behind two elements of another one."""
        share = chunk_numel(flat.size, world)
        parts = (flat[rank * share : (rank + 1) * share].tobytes() for rank in range(world))
        size = array.itemsize
        padded = [bytes(2 * size) + part.ljust(share * size, b"\xee") for part in parts]
        return RankChunks(tuple(Partition(self.extent(one), share + 2) for one in padded), size, 2, flat.size)

    def _frozen(self, array: Array, flat: Array, world: int = 4) -> RankChunks:
        from array import array as numbers

        share = chunk_numel(flat.size, world)
        parts = (flat[rank * share : (rank + 1) * share].tobytes() for rank in range(world))
        extents = [self.extent(part.ljust(share * array.itemsize, b"\xee")) for part in parts]
        files, offsets = tuple(one.file for one in extents), tuple(numbers("q", [7, one.offset]) for one in extents)
        return RankChunks(Fragments(files, offsets, 1, share, array.itemsize), array.itemsize, 0, flat.size)


def as_json(plan_text: str) -> dict[str, object]:
    """Returns a plan as any tool reads it."""
    found: dict[str, object] = json.loads(plan_text)
    return found
