"""AutoTP's own account of how it cut a parameter: ``affine_map``, which 0.19 writes into the model files.

For each rank, blocks of equal shape in the whole tensor (``source``) and in the shard (``dest``), each as the offset
and strides of ``torch.as_strided``; ``locations`` are the ranks that hold a block (``checkpoint/affine.py``). All that
is written has the strides of the two tensors, so that a block is a box of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shardmerge.shown import shown
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.tensors import Shape
from shardmerge.tensors.shards import ShardPart
from shardmerge.tensors.strides import row_major


def affine_layout(
    entry: Mapping[object, PickleValue], shapes: Sequence[Shape]
) -> tuple[Shape, tuple[ShardPart, ...], bool] | str:
    """Returns shape and parts of a whole tensor and whether any is scaled, or what in the map cannot be.

    Parameters
    ----------
    entry
        The map of one parameter.
    shapes
        Of its shards, by rank.
    """
    logical = _numbers(entry.get("logical_shape"))
    ranks = as_dict(entry.get("ranks"))
    if logical is None or len(logical) != len(shapes[0]) or set(ranks) != set(range(len(shapes))):
        return f"a map of a tensor {shown(entry.get('logical_shape'))} over the ranks {shown(list(ranks))}"
    parts: list[ShardPart] = []
    scaled = False
    for rank, shape in enumerate(shapes):
        mine = as_dict(ranks[rank])
        if _numbers(mine.get("shard_shape")) != shape:
            return f"a shard {shown(mine.get('shard_shape'))} of rank {rank}"
        for piece in _pieces(mine):
            part = _part(rank, piece, logical, shape)
            if part is None:
                return f"a block {shown(dict(piece))} of rank {rank}"
            parts.append(part)
            scaled = scaled or piece.get("scale", 1.0) != 1.0
    return logical, tuple(parts), scaled


def _pieces(rank: Mapping[object, PickleValue]) -> Iterator[Mapping[object, PickleValue]]:
    pieces = rank.get("pieces")
    yield from (as_dict(piece) for piece in (pieces if isinstance(pieces, list) else []))


def _part(rank: int, piece: Mapping[object, PickleValue], whole: Shape, shard: Shape) -> ShardPart | None:
    shape = _numbers(piece.get("shape"))
    if shape is None or len(shape) != len(whole):
        return None
    if 0 in shape:  # what a rank has none of lies anywhere
        zeros = (0,) * len(shape)
        return ShardPart(rank, shape, zeros, zeros)
    at, inside = _corner(piece.get("source"), shape, whole), _corner(piece.get("dest"), shape, shard)
    return ShardPart(rank, shape, inside, at) if at is not None and inside is not None else None


def _corner(view: PickleValue, shape: Shape, tensor: Shape) -> tuple[int, ...] | None:
    """Returns the first element of a view, an index an axis; ``None`` where the view is no box of the tensor."""
    if not isinstance(view, (list, tuple)) or len(view) != 2:
        return None
    offset, strides = view[0], _numbers(view[1])
    steps = row_major(tensor)
    if not isinstance(offset, int) or strides is None or len(strides) != len(shape) or len(tensor) != len(shape):
        return None
    if any(n > 1 and mine != step for n, mine, step in zip(shape, strides, steps, strict=True)):
        return None
    corner = []
    for step in steps:
        index, offset = divmod(offset, step) if step else (0, offset)
        corner.append(index)
    inside = all(0 <= at <= m - n for at, n, m in zip(corner, shape, tensor, strict=True))
    return tuple(corner) if inside and not offset else None


def _numbers(value: PickleValue) -> Shape | None:
    if not isinstance(value, (list, tuple)):
        return None
    found = tuple(item for item in value if isinstance(item, int) and item >= 0)
    return found if len(found) == len(value) else None
