"""Tensors that a checkpoint lists and whose data lie elsewhere: what an ungathered save of ZeRO-3 leaves.

DeepSpeed frees a partitioned parameter by giving it the data of ``torch.empty(0)`` (``zero/partition_parameters.py``,
``free_param``); versions of 2020 gave it ``torch.ones(1)``. A state dict that was taken without gathering then has
shape ``[0]``, or ``[1]``, under the names of all large parameters (hiyouga/LLaMA-Factory#2868, 01-ai/Yi#129).

Models with tensors that really are empty exist, so what other tensors say counts:

- ``[0]`` of a float type, or called ``weight``, is a placeholder. A layer norm or bias of width 0 is known by a
  matrix without elements beside it; ``_extra_state`` of TransformerEngine and empty integers (GPTQ's ``g_idx``) are
  real.
- ``[0, 5]`` is real, unless the same tensor of another layer has elements.
- ``[1]`` is real, unless it is called ``weight`` and either the same tensor of another layer is a matrix, or its name
  is one that only matrices have.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from shardmerge.tensors import Catalog, Shape, TensorEntry

_Key: TypeAlias = Callable[[str], str]

# Modules whose weight is a matrix in every model: embeddings, heads, projections, the two factors of LoRA.
_MATRIX = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|wpe|word_embeddings|lm_head|\w+_proj|query|key|value|query_key_value|c_attn|c_fc"
    r"|fc\d?|lora_[AB](?:\.\w+)?)"
)
_NUMBER = re.compile(r"\d+")
_REAL = "_extra_state"


def without_placeholders(catalog: Catalog) -> Catalog:
    """Returns the catalog with placeholders moved from its entries to ``absent``, and a warning that says so."""
    found = placeholders(catalog.entries)
    if not found:
        return catalog
    shapes = " or ".join(sorted({str(list(catalog.entries[name].shape)) for name in found}))
    tied = {alias for alias, owner in catalog.aliases.items() if owner in found}
    names = sorted(found | tied)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    warning = f"{len(names)} names are placeholders without data (shape {shapes}), taken as absent: {shown}"
    return replace(
        catalog,
        entries={name: entry for name, entry in catalog.entries.items() if name not in found},
        aliases={alias: owner for alias, owner in catalog.aliases.items() if alias not in tied},
        absent=catalog.absent | found | tied,
        warnings=(*catalog.warnings, warning),
    )


def placeholders(entries: Mapping[str, TensorEntry]) -> frozenset[str]:
    """Returns the names of those entries that hold no data of the tensor they are called after."""
    hollow = {name: entry for name, entry in entries.items() if entry.shape == (1,) or 0 in entry.shape}
    if not hollow:
        return frozenset()
    same = _grouped(entries, set(map(_any_layer, hollow)), _any_layer)
    beside = _grouped(entries, set(map(_module, hollow)), _module)
    return frozenset(
        name for name, entry in hollow.items() if _is_placeholder(entry, same[_any_layer(name)], beside[_module(name)])
    )


def _is_placeholder(entry: TensorEntry, same: Iterable[Shape], beside: Iterable[Shape]) -> bool:
    shape, leaf = entry.shape, entry.name.rpartition(".")[2]
    if shape == (0,):
        if leaf == _REAL or any(len(other) > 1 and 0 in other for other in beside):
            return False
        return entry.dtype.kind == "float" or leaf == "weight"
    if shape != (1,):
        return any(len(other) == len(shape) and 0 not in other for other in same)
    if leaf != "weight" or entry.dtype.kind != "float":
        return False
    return bool(_MATRIX.fullmatch(_module(entry.name))) or any(len(other) > 1 for other in same)


def _grouped(entries: Mapping[str, TensorEntry], keys: set[str], key: _Key) -> defaultdict[str, set[Shape]]:
    """Returns the shapes that occur under each of some keys."""
    found: defaultdict[str, set[Shape]] = defaultdict(set)
    for name, entry in entries.items():
        if (mine := key(name)) in keys:
            found[mine].add(entry.shape)
    return found


def _any_layer(name: str) -> str:
    """Returns a name without its layer. A number right before the leaf, of a Sequential, stays: its modules differ."""
    *path, module, leaf = ["", "", *name.split(".")]
    return ".".join(["*" if _NUMBER.fullmatch(part) else part for part in path] + [module, leaf])


def _module(name: str) -> str:
    return name.rpartition(".")[0]
