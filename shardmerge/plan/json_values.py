"""JSON values of a file that somebody may have touched: each is asked to be what it should be."""

from __future__ import annotations

from typing import TypeAlias

Row: TypeAlias = "dict[str, object]"


def whole(value: object) -> int:
    """Returns an integer, or raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is no integer")


def natural(value: object) -> int:
    """Returns an integer that is not negative, or raises ValueError."""
    if type(value) is int and value >= 0:  # a bool is no int here
        return value
    raise ValueError(f"{value!r} is no number of things")


def naturals(value: object) -> tuple[int, ...]:
    """Returns integers that are not negative, or raises ValueError."""
    return tuple(natural(item) for item in listed(value))


def text(value: object) -> str:
    """Returns a string, or raises ValueError."""
    if isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is no text")


def listed(value: object) -> list[object]:
    """Returns a list, or raises ValueError."""
    if isinstance(value, list):
        return value
    raise ValueError(f"{value!r} is no list")


def fields(value: object) -> Row:
    """Returns an object, or raises ValueError."""
    if isinstance(value, dict):
        return value
    raise ValueError(f"{value!r} is no object")


def numbers(value: object) -> tuple[int, ...]:
    """Returns integers, or raises ValueError."""
    return tuple(whole(item) for item in listed(value))


def texts(value: object) -> tuple[str, ...]:
    """Returns strings, or raises ValueError."""
    return tuple(text(item) for item in listed(value))
