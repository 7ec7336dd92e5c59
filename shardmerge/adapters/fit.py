"""Whether a tensor can be the one that a module of an adapter changes, by its shape. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from shardmerge.adapters.parts import AdapterTensors
from shardmerge.tensors import Shape, TensorEntry
from shardmerge.tensors.vocabulary_names import OVER_VOCABULARY

Fit: TypeAlias = Callable[[str, Shape], bool]


def wanted(parts: AdapterTensors) -> dict[str, Fit]:
    """Returns the names that the base must have for an adapter, and a test of name and shape for each."""
    low_rank = {f"{module}.weight": partial(_fits, held) for module, held in parts.modules.items()}
    trained = {name: partial(_replaces, parts.whole[name]) for name in parts.trained if name in parts.whole}
    return {**low_rank, **trained}


def _replaces(entry: TensorEntry, name: str, shape: Shape) -> bool:
    """A vocabulary may have grown in the run."""
    return entry.shape == shape or (name.endswith(OVER_VOCABULARY) and entry.shape[1:] == shape[1:])


def _fits(held: Mapping[str, TensorEntry], name: str, shape: Shape) -> bool:
    """``a`` is ``[r, in]``, ``b`` ``[out, r]``, and the base ``[out, in]`` or, of Conv1D, ``[in, out]``."""
    if "tokens" in held:
        return held["tokens"].shape[1:] == shape[1:]
    if "embedding_b" in held:
        return held["embedding_b"].shape[:1] == shape[1:]
    a, b = held.get("a"), held.get("b")
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
        return True  # half a pair, which is refused elsewhere
    if len(shape) != 2 or len(a.shape) > 2:
        return bool(shape) and (len(a.shape) == 2 or b.shape[0] == shape[0])  # fused experts, and convolutions
    sides = (b.shape[0], a.shape[1])
    return shape in (sides, sides[::-1]) or (name.endswith(OVER_VOCABULARY) and sides[1] == shape[1])
