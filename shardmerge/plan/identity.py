"""What decides the bytes of a result, and nothing else: the plan's id is the SHA-256 of it.

Two plans that differ in a name of a source, a comment of the mapping, a path or a warning write the same bytes and
have one id. So have plans that say the same move in other words: a slice and a split, a transpose of a transpose, what
lies in one piece and in two beside each other. What is computed is compared as it is written: two formulas that happen
to give the same numbers have two ids.

Nobody reads the data of a source to tell it from another. A file is its size, its header, and the time it was last
modified; a copy that keeps the time is the same file, and one that does not is another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from shardmerge.json_rows import Fields, Rows, canonical_text
from shardmerge.ops.casts import Cast
from shardmerge.ops.contract import Op
from shardmerge.ops.written import op_row
from shardmerge.plan.expressions import Tables, chunks_row
from shardmerge.plan.shard import PlannedShard
from shardmerge.tensors import Box, Boxes, Columns, Extent, FileStamp, Made, Shape, SideFile, Strided, TensorEntry, View
from shardmerge.tensors.pieces import single_extent
from shardmerge.tensors.ranks import RankChunks
from shardmerge.tensors.strides import direct, in_order

# Version of what a plan means, and of its text. It is part of the plan id.
SCHEMA = 4

# The pieces of so many ranks are listed: that a few pieces follow a rule makes no other bytes of them.
_FEW_RANKS = 8


def identity(
    shards: Sequence[PlannedShard],
    side_files: Sequence[SideFile],
    copies: Mapping[Extent, str],
    files: Sequence[FileStamp],
) -> str:
    """Returns the SHA-256 (hex) of what decides the bytes of a result.

    Parameters
    ----------
    shards, side_files
        What is written.
    copies
        SHA-256 of the parts of side files that are copied.
    files
        Stamps of all files that are read.
    """
    tables = Tables()
    stamps = {stamp.path: stamp for stamp in files}
    value = Fields(
        {  # in the order of the alphabet, as it is written: the last two know what the shards named
            "schema": SCHEMA,
            "shards": Rows(lambda: (_shard(shard, tables) for shard in shards)),
            "side_files": Rows(lambda: (_side(side, copies) for side in sorted(side_files, key=lambda s: s.name))),
            "tables": Rows(lambda: iter(tables.ranks)),
            "used_files": Rows(lambda: _files(tables, stamps)),
        }
    )
    digest = hashlib.sha256()
    for piece in canonical_text(value):
        digest.update(piece.encode())
    return digest.hexdigest()


def _files(tables: Tables, stamps: Mapping[str, FileStamp]) -> Iterator[list[object]]:
    """Yields what tells the files that were named; of two that look alike, the paths too: they are not one."""
    found = {path: _file(stamps[path]) for path in tables.files}
    alike = Counter(map(tuple, found.values()))
    for path, row in found.items():
        yield [*row, path] if alike[tuple(row)] > 1 else row


def _file(stamp: FileStamp) -> list[object]:
    return [stamp.size, stamp.mtime_ns, stamp.header]


def _side(side: SideFile, copies: Mapping[Extent, str]) -> list[object]:
    """The same for bytes made here and for the same bytes copied: nobody can tell them apart."""
    parts = [
        [len(part), hashlib.sha256(part).hexdigest()] if isinstance(part, bytes) else [part.nbytes, copies[part]]
        for part in side.parts
    ]
    return [side.name, parts]


def _shard(shard: PlannedShard, tables: Tables) -> Fields:
    fields = {tensor.name: tensor.offset for tensor in shard.tensors} if shard.checksums else {}
    return Fields(
        {
            "blobs": [[offset, hashlib.sha256(blob).hexdigest()] for offset, blob in shard.blobs],
            "checksums": sorted([fields[name], list(places)] for name, places in shard.checksums.items()),
            "data": Rows(lambda: ([tensor.offset, _segments(tensor.entry, tables)] for tensor in shard.tensors)),
            "name": shard.name,
            "nbytes": shard.nbytes,
        }
    )


def _segments(entry: TensorEntry, tables: Tables) -> list[object]:
    """Returns what makes the bytes of a tensor, one behind the other: ranges of files, or whatever else."""
    found: list[object] = []
    for segment in _each(entry, tables):
        last = found[-1] if found else None
        if (
            isinstance(last, list)
            and isinstance(segment, list)
            and last[0] == segment[0]
            and sum(last[1:]) == segment[1]
        ):
            last[2] += segment[2]  # goes on where the last range ends
        else:
            found.append(segment)
    return found


def _each(entry: TensorEntry, tables: Tables) -> Iterator[object]:
    size = entry.dtype.itemsize
    if isinstance(entry.pieces, RankChunks) and len(entry.pieces) > _FEW_RANKS:
        yield {**chunks_row(entry.pieces, tables), "size": size}
        return
    for piece in entry.pieces:
        held = piece.held
        if isinstance(held, Extent):
            yield _range(held, tables)
        elif isinstance(held, Strided):
            yield _seen(0, held.shape, held.strides, size, [_range(held.extent, tables)])
        elif isinstance(held, Boxes):
            yield {"boxes": [_box(box, size, tables) for box in held.boxes], "shape": list(held.shape), "size": size}
        elif isinstance(held, Columns):
            yield from _columns(held, tables)
        elif isinstance(held, Made):
            yield _made(held, tables)
        else:
            yield from _view(entry, direct(held), tables)


def _range(extent: Extent, tables: Tables) -> list[object]:
    return [tables.file(extent.file), extent.offset, extent.nbytes]


def _box(box: Box, size: int, tables: Tables) -> list[object]:
    held = box.held
    if isinstance(held, Extent):
        return [list(box.offsets), list(box.shape), _range(held, tables)]
    return [list(box.offsets), list(box.shape), _seen(0, held.shape, held.strides, size, [_range(held.extent, tables)])]


def _view(entry: TensorEntry, held: View, tables: Tables) -> Iterator[object]:
    """A view of all in order is what it sees; so is one of a part that lies in one range."""
    extent = single_extent(entry, 0, entry.numel)
    if extent is not None:
        yield _range(extent, tables)
    elif entry.numel == held.base.numel and in_order(held.shape, held.strides):
        yield from _each(held.base, tables)
    else:
        yield _seen(held.offset, held.shape, held.strides, entry.dtype.itemsize, _segments(held.base, tables))


def _columns(held: Columns, tables: Tables) -> Iterator[object]:
    bases = [base for base in held.bases if base.numel]
    if held.rows == 1 or len(bases) == 1:
        for base in bases:
            yield from _each(base, tables)
    else:
        yield {"rows": held.rows, "of": [[base.nbytes, _segments(base, tables)] for base in bases]}


def _made(held: Made, tables: Tables) -> dict[str, object]:
    """What is done to each element alone does not depend on the shape."""
    assert isinstance(held.recipe, Op)
    alone = isinstance(held.recipe, Cast)
    shapes = [[base.numel] if alone else list(base.shape) for base in held.bases]
    of = [[base.dtype.name, shape, _segments(base, tables)] for base, shape in zip(held.bases, shapes, strict=True)]
    return {**op_row(held.recipe), "of": of}


def _seen(offset: int, shape: Shape, strides: Sequence[int], size: int, of: list[object]) -> dict[str, object]:
    """A view, its axes as few as they can be: those of one element go, and those that run on are one."""
    axes: list[tuple[int, int]] = []
    for n, step in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if axes and axes[-1][1] == n * step:
            axes[-1] = axes[-1][0] * n, step
        else:
            axes.append((n, step))
    return {"view": [offset, *axes], "size": size, "of": of}
