"""An op as JSON values, exactly, and back: how it stands in a plan that is written down.

An op is called by the name of its class, and its parameters by those of its fields. A float is written as ``repr``
writes it, which gives the same float back; JSON has no word for those that are not finite, so they are text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import lru_cache
from importlib import import_module
from math import copysign, isfinite
from typing import Any

from shardmerge.dtypes import DTYPES, DType
from shardmerge.ops.contract import Op

# Where the class of an op is, by its name; a plan imports the families that it needs.
_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "casts": ("Cast", "Widen"),
    "cutting": ("Chunk", "Slice", "Split", "Unstack"),
    "dequantize": ("Dequantize",),
    "extract": ("LoraExtract",),
    "fill": ("Arange", "Fill"),
    "heads": ("GroupedMerge", "GroupedSplit", "Rotary"),
    "dora": ("Dora", "DoraOnto"),
    "joining": ("Concat", "Stack"),
    "lora": ("Lora",),
    "lycoris": ("LoHa", "LoKr", "ScaleBy"),
    "merging": ("Breadcrumbs", "Dare", "Della", "TaskArithmetic", "Ties"),
    "pointwise": ("AddTopLeft", "AssertEqual", "Linear"),
    "residual": ("Residual",),
    "rearranging": ("Permute", "Reshape", "Squeeze", "Transpose", "Unsqueeze"),
    "spherical": ("Karcher", "MultiSlerp", "NuSlerp", "Slerp"),
    "stock": ("ModelStock",),
    "swapping": ("ArceeFusion", "NearSwap"),
    "agreement": ("Ram", "Sce"),
    "vocabulary": ("NewRows",),
}
_HOMES = {name: family for family, names in _FAMILIES.items() for name in names}


def op_row(op: Op) -> dict[str, object]:
    """Returns an op as JSON values: its name under ``op``, and all its parameters."""
    kind = type(op)
    return {"op": kind.__name__, **{field.name: _written(getattr(op, field.name), field) for field in _fields(kind)}}


def op_of(row: Mapping[str, object]) -> Op:
    """Returns the op that ``op_row`` wrote.

    Raises
    ------
    ValueError
        There is no such op, or it has other parameters.
    """
    kind = op_class(str(row.get("op")))
    found = _fields(kind)
    if {field.name for field in found} != row.keys() - {"op"}:
        raise ValueError(f"the op {kind.__name__} has other parameters: {sorted(row.keys() - {'op'})}")
    return kind(**{field.name: _read(row[field.name], field) for field in found})


@lru_cache(maxsize=64)
def op_class(name: str) -> Callable[..., Op]:
    """Returns the class of an op; raises ValueError where there is none of the name."""
    if name not in _HOMES:
        raise ValueError(f"there is no op {name!r}")
    found: Callable[..., Op] = getattr(import_module(f"shardmerge.ops.{_HOMES[name]}"), name)
    return found


@lru_cache(maxsize=64)
def _fields(kind: Any) -> tuple[Field[Any], ...]:  # noqa: ANN401  # any dataclass
    return fields(kind)


def _written(value: object, field: Field[Any]) -> object:
    """An integer where a float is meant is the float: equal ops are written alike."""
    if isinstance(value, DType):
        return value.name
    if isinstance(value, tuple):
        return [_written(item, field) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and "float" in str(field.type):
        return float(value) if isfinite(value) else f"{'-' if copysign(1, value) < 0 else ''}{abs(value)}"
    return value


def _read(value: object, field: Field[Any]) -> object:
    if isinstance(value, list):
        return tuple(_read(item, field) for item in value)
    if "DType" in str(field.type) and isinstance(value, str):
        if value not in DTYPES:
            raise ValueError(f"there is no element type {value!r}")
        return DTYPES[value]
    if "float" in str(field.type) and isinstance(value, (int, float, str)):
        return float(value)
    return value
