"""The order in which tensors are made: that of their sources, so that files are read from front to back.

The bytes do not depend on it: everything is written at its final offset.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardmerge.plan.shard import PlannedTensor
from shardmerge.tensors import Boxes, Extent, Strided, TensorEntry


def ordered(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Returns the tensors of a shard by the file that their first element comes from, and by its place there.

    Output is in the order of names, a checkpoint in that of the model: ``lm_head`` before ``model.embed_tokens``,
    ``input_layernorm`` before ``self_attn``. Tensors that come from the same place, or from nowhere, keep their order.
    """
    return sorted(tensors, key=lambda tensor: first_byte(tensor.entry))


def first_byte(entry: TensorEntry) -> tuple[str, int]:
    """Returns file and offset of the first bytes that a tensor is made of; ``("", 0)`` where it reads none."""
    while entry.pieces:
        held = entry.pieces[0].held
        if isinstance(held, Boxes):
            held = held.boxes[0].held
        if isinstance(held, Strided):
            held = held.extent
        if isinstance(held, Extent):
            return held.file, held.offset
        if not held.bases:
            break
        entry = held.bases[0]
    return "", 0
