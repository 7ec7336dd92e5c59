"""The whole story of one tensor of a plan: the rule, what it is made of, where its bytes lie and go. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from shardmerge.errors import UsageError
from shardmerge.json_rows import JSON_SCHEMA
from shardmerge.mapping.near import NameIndex, printable
from shardmerge.plan.memory import LARGEST_TILE, making_peak
from shardmerge.plan.shard import PlannedShard, PlannedTensor, bytes_read, is_copy
from shardmerge.plan.tables import human_bytes
from shardmerge.plan.value import Plan
from shardmerge.tensors import Box, Boxes, Extent, Piece, Strided, TensorEntry, composed

# A tensor of a ZeRO checkpoint has a piece for each of a thousand ranks.
_PIECES_SHOWN = 4


def find_tensor(plan: Plan, name: str) -> tuple[PlannedShard, PlannedTensor]:
    """Returns a tensor of the plan and the file it is written to.

    Raises
    ------
    UsageError
        ``unknown-tensor``, with the nearest names.
    """
    for shard in plan.shards:
        for tensor in shard.tensors:
            if name in (tensor.name, tensor.stored):
                return shard, tensor
    near = NameIndex(tensor.name for tensor in plan.tensors()).near(name)
    hint = f"near names: {', '.join(near)}" if near else "`shardmerge plan MAPPING --tensors` lists the names"
    raise UsageError("unknown-tensor", f"the plan has no tensor {printable(name)!r}", hint=hint)


def tensor_story_json(plan: Plan, name: str, rule_lines: tuple[str, ...] = ()) -> dict[str, object]:
    """Returns the story of one tensor as plain JSON values.

    Parameters
    ----------
    plan, name
        The plan, and a name of its target.
    rule_lines
        The rule as it is written.

    Raises
    ------
    UsageError
        ``unknown-tensor``.
    """
    shard, tensor = find_tensor(plan, name)
    return {
        "schema": JSON_SCHEMA,
        "name": tensor.name,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "nbytes": tensor.nbytes,
        "rule": tensor.rule,
        "rule_lines": list(rule_lines),
        "made": _node_json(tensor.entry),
        "copy": is_copy(tensor.entry),
        "bytes_read": bytes_read(tensor),
        "memory": making_peak(tensor.entry, LARGEST_TILE),
        "written": {"file": shard.name, "name": tensor.stored, "offset": tensor.offset, "nbytes": tensor.nbytes},
    }


def tensor_story_text(plan: Plan, name: str, rule_lines: tuple[str, ...] = ()) -> str:
    """Returns the story of one tensor for people; parameters and errors as ``tensor_story_json``."""
    shard, tensor = find_tensor(plan, name)
    stored = f" as {tensor.stored}" if tensor.stored != tensor.name else ""
    read = "copied as it is" if is_copy(tensor.entry) else "computed"
    lines = [
        f"{tensor.name}  {tensor.dtype} {list(tensor.shape)}  {human_bytes(tensor.nbytes)}",
        f"rule     {tensor.rule}",
        *(f"         {line}" for line in rule_lines),
        "made of",
        *(f"  {line}" for line in _node_lines(tensor.entry)),
        f"reads    {human_bytes(bytes_read(tensor))}, {read}",
        f"memory   {human_bytes(making_peak(tensor.entry, LARGEST_TILE))} a worker at most",
        f"written  {shard.name}{stored}, bytes {tensor.offset} to {tensor.offset + tensor.nbytes}",
    ]
    return "\n".join(lines)


def _node_json(entry: TensorEntry) -> dict[str, object]:
    held = composed(entry)
    meta: dict[str, object] = {"dtype": entry.dtype.name, "shape": list(entry.shape)}
    if held is not None:
        return {"op": held.recipe.label, **meta, "of": [_node_json(base) for base in held.bases]}
    parts = _parts(entry)
    return {
        "source": entry.source,
        "tensor": entry.name,
        **meta,
        "origin": entry.origin,
        "nbytes": entry.nbytes,
        "pieces": len(parts),
        "first_pieces": [_part_json(part) for part in islice(parts, _PIECES_SHOWN)],
    }


def _parts(entry: TensorEntry) -> Sequence[Piece | Box]:
    """Returns the pieces of a tensor of a checkpoint, or the boxes of the one that is held by some."""
    held = entry.pieces[0].held if len(entry.pieces) == 1 else None
    return held.boxes if isinstance(held, Boxes) else entry.pieces


def _extent(part: Piece | Box) -> Extent:
    held = part.held.extent if isinstance(part.held, Strided) else part.held
    assert isinstance(held, Extent)  # composed entries have gone another way, and boxes are parts
    return held


def _part_json(part: Piece | Box) -> dict[str, object]:
    extent = _extent(part)
    found: dict[str, object] = (
        {"start": part.start, "count": part.count}
        if isinstance(part, Piece)
        else {"offsets": list(part.offsets), "shape": list(part.shape)}
    )
    found |= {"file": extent.file, "offset": extent.offset, "nbytes": extent.nbytes}
    if isinstance(part.held, Strided):
        found["view"] = {"shape": list(part.held.shape), "strides": list(part.held.strides)}
    return found


def _node_lines(entry: TensorEntry) -> Iterator[str]:
    """Yields an expression, one op a line, what it works on further in."""
    held = composed(entry)
    meta = f"{entry.dtype} {list(entry.shape)}"
    if held is not None:
        yield f"{held.recipe.label}  -> {meta}"
        for base in held.bases:
            yield from (f"  {line}" for line in _node_lines(base))
        return
    origin = f"  ({entry.origin})" if entry.origin else ""
    yield f"{entry.source}:{printable(entry.name)}  {meta}{origin}" if entry.name else f"nothing  {meta}"
    parts = _parts(entry)
    for part in islice(parts, _PIECES_SHOWN):
        yield f"  {_part_line(part)}"
    more = len(parts) - _PIECES_SHOWN
    if more > 0:
        yield f"  and {more:,} more {'boxes' if isinstance(parts[0], Box) else 'pieces'}"


def _part_line(part: Piece | Box) -> str:
    extent = _extent(part)
    view = f", seen with strides {list(part.held.strides)}" if isinstance(part.held, Strided) else ""
    if isinstance(part, Piece):
        elements = f"elements {part.start} to {part.start + part.count}"
    else:
        elements = f"a box {list(part.shape)} at {list(part.offsets)}"
    return f"{extent.file}, bytes {extent.offset} to {extent.offset + extent.nbytes}: {elements}{view}"
