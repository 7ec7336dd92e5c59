"""What holds of every plan, looked at in one that was read: its text may be anybody's, with a digest that is right.

Paths stay inside of the output, and every element of the result comes from somewhere. A plan may name any file to read,
and any output path: so may a mapping.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import prod

from shardmerge.errors import MappingError
from shardmerge.ops.casts import Cast
from shardmerge.ops.contract import Arithmetic, ColumnsLayout, Meta, Move, Op, ViewLayout
from shardmerge.plan.shard import PlannedShard
from shardmerge.tensors import Composed, Extent, FileStamp, Made, Piece, Strided, TensorEntry, View, composed
from shardmerge.tensors.file_roles import RECEIPT
from shardmerge.tensors.ranks import Fragments, RankChunks, chunk_numel
from shardmerge.tensors.strides import span

_DIGEST = frozenset("0123456789abcdef")


def check_id(plan_id: str) -> None:
    """Raises ValueError for what is no id of a plan: directories are named by it."""
    if len(plan_id) != 64 or not set(plan_id) <= _DIGEST:
        raise ValueError(f"{plan_id!r} is no plan id")


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError unless every name is the path of a file of its own inside of the output directory."""
    seen = {RECEIPT}
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")
        if "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
            raise ValueError(f"{name!r} is no path inside of the output")
        above = {"/".join(parts[:n]) for n in range(1, len(parts))}
        if name in seen | folders or above & seen:
            raise ValueError(f"{name!r} is the path of another file as well")
        seen.add(name)
        folders |= above


def check_copies(copies: Iterable[Extent], files: Collection[FileStamp]) -> None:
    """Raises ValueError unless what is copied as it is lies in small files that are looked at before."""
    known = {stamp.path: stamp.size for stamp in files}
    for one in copies:
        if one.offset + one.nbytes > known.get(one.file, -1):
            raise ValueError(f"{one.file} is copied, and is none of the small files beside the sources")


def check_shard(shard: PlannedShard, nbytes: int) -> None:
    """Raises ValueError unless a file begins with a header, and no two things lie at one place of it, or behind it."""
    if shard.nbytes != nbytes or not shard.blobs or shard.blobs[0][0] or len(shard.blobs[0][1]) < 8:
        raise ValueError(f"{shard.name} has another size than its part, or no header")
    spans = [(offset, len(blob)) for offset, blob in shard.blobs]
    spans += [(tensor.offset, tensor.nbytes) for tensor in shard.tensors if tensor.nbytes]  # others lie inside of blobs
    end = 0
    for offset, length in sorted(spans):
        if offset < end or offset + length > nbytes:
            raise ValueError(f"two things lie at byte {offset} of {shard.name}, or one behind its end")
        end = offset + length
    _check_checksums(shard, {tensor.name for tensor in shard.tensors})


def _check_checksums(shard: PlannedShard, names: Collection[str]) -> None:
    for name, places in shard.checksums.items():
        for at in places:
            if name not in names or not any(low <= at <= low + len(blob) - 4 for low, blob in shard.blobs):
                raise ValueError(f"the checksum of {name} has no place in {shard.name}")


def check_entry(entry: TensorEntry) -> None:
    """Raises ValueError unless each element of a tensor comes from one place; what it is made of was looked at."""
    held = composed(entry)
    if isinstance(entry.pieces, RankChunks):
        _check_ranks(entry, entry.pieces)
    elif held is not None:
        _check_composed(entry, held)
    else:
        _check_pieces(entry)


def _check_pieces(entry: TensorEntry) -> None:
    end = 0
    for piece in entry.pieces:
        if piece.start != end or piece.count < 1 or not _fits(entry, piece):
            raise ValueError(f"the pieces of {entry.name} do not lie one behind the other")
        end += piece.count
    if end != entry.numel:
        raise ValueError(f"the pieces of {entry.name} are not all of it")


def _fits(entry: TensorEntry, piece: Piece) -> bool:
    """A view sees as many elements, and spans its bytes from the first to the last; all else is dense as it is read."""
    held = piece.held
    return not isinstance(held, Strided) or (
        prod(held.shape) == piece.count and held.extent.nbytes == span(held.shape, held.strides) * entry.dtype.itemsize
    )


def _check_ranks(entry: TensorEntry, chunks: RankChunks) -> None:
    """Every rank's tensor reaches to the end of its share."""
    table = chunks.partitions
    end = chunks.start + chunk_numel(chunks.numel, len(table))
    numel = table.numel if isinstance(table, Fragments) else min(part.numel for part in table)
    if chunks.numel != entry.numel or end > numel:
        raise ValueError(f"the ranks do not hold {entry.name}")


def _check_composed(entry: TensorEntry, held: Composed) -> None:
    op, metas = held.recipe, [Meta.of(base) for base in held.bases]
    assert isinstance(op, Op)  # as it was read
    try:
        fits = op.infer(metas) == Meta.of(entry) and _is_done_by(op, held, metas)
    except MappingError as error:
        raise ValueError(f"{op.label}: {error.what}") from error
    if not fits:
        raise ValueError(f"{op.label} makes another tensor of what it is given")


def _is_done_by(op: Op, held: Composed, metas: list[Meta]) -> bool:
    if isinstance(held, Made):
        return isinstance(op, Arithmetic) and not (isinstance(op, Cast) and metas[0].dtype != op.source)
    if not isinstance(op, Move):
        return False
    layout = op.layout(metas)
    if isinstance(held, View):
        return layout == ViewLayout(held.offset, held.shape, held.strides)
    return layout == ColumnsLayout(held.rows)
