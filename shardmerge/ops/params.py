"""Parameters of an op, as the reader of a mapping gives them to the function that builds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from shardmerge.errors import MappingError
from shardmerge.ops.contract import Param, ParamValue, Texts

ParamValues: TypeAlias = Mapping[str, ParamValue]

DIM = Param("dim", "int", "The axis, counted from 0, or from the end with a minus.", 0)
TAKE = Param("take", "int", "Which part, counted from 0.")


def integer(values: ParamValues, key: str) -> int:
    """Returns an integer parameter."""
    value = values[key]
    assert isinstance(value, int)  # the reader of the mapping made sure
    return value


def integers(values: ParamValues, key: str) -> tuple[int, ...]:
    """Returns a parameter that is a list of integers."""
    value = values.get(key, ())
    assert isinstance(value, tuple)
    return tuple(int(item) for item in value)


def take(values: ParamValues, parts: int) -> int:
    """Returns ``take``, which must be one of so many parts."""
    found = integer(values, "take")
    if not 0 <= found < parts:
        raise MappingError(
            "op-value", f"`take: {found}` is not one of {parts} parts", expected=f"0 to {parts - 1}",
            hint=f"write `take: {parts - 1}` for the last part: the first is 0",
        )  # fmt: skip
    return found


def positive(values: ParamValues, *keys: str) -> tuple[int, ...]:
    """Returns integer parameters that must be at least 1."""
    found = tuple(integer(values, key) for key in keys)
    for key, value in zip(keys, found, strict=True):
        if value < 1:
            raise MappingError("op-value", f"`{key}` is {value}", expected="at least 1")
    return found


def same(params: Texts) -> Texts:
    """Undone with the same parameters."""
    return params
