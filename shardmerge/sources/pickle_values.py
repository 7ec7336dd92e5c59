"""What a pickle comes to: values of our own that do nothing, whatever the file says.

A class or function that a pickle names is a ``Global``, what it would build an ``Opaque`` record, a tensor a
``TensorRef`` of a ``StorageRef``. All else are Python's plain values and containers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.dtypes import DType


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. Never resolved; dots in ``name`` stay text."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """``module.name``, for people."""
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Opaque:
    """An object that is carried and never built.

    Attributes
    ----------
    type
        The class or function that would have been called.
    args
        What it would have been called with.
    state
        What BUILD would have given to it, ``None`` without one.
    items
        What would have been appended, or set as ``(key, value)`` pairs.
    """

    type: Global
    args: tuple[PickleValue, ...]
    state: PickleValue = None
    items: list[PickleValue] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage that the file holds: its key, and its length in elements of ``dtype``."""

    key: str
    dtype: DType
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as a view of a storage. ``offset`` and ``strides`` count elements of ``dtype``.

    ``dtype`` differs from the storage's for the types that torch saves as bytes (``_rebuild_tensor_v3``).
    Whether the view lies inside its storage is checked where the storage's bytes are: ``TorchFile.entry``.
    """

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


PickleValue: TypeAlias = (
    "bool | int | float | str | bytes | list[PickleValue] | tuple[PickleValue, ...] | dict[object, PickleValue]"
    " | set[object] | Global | Opaque | StorageRef | TensorRef | None"
)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A pickle, read.

    Attributes
    ----------
    value
        What it holds.
    end
        Index after its STOP opcode.
    storages
        Every storage that was named, by key, in order of appearance.
    """

    value: PickleValue
    end: int
    storages: dict[str, StorageRef]


def kind(value: PickleValue) -> str:
    """Returns what a value is, for a message: the name of a class or function, else its type."""
    return value.path if isinstance(value, Global) else type(value).__name__


def attributes(value: PickleValue) -> Mapping[object, PickleValue]:
    """Returns the attributes of an object by name, those of a class with ``__slots__`` too; empty for anything else."""
    state = value.state if isinstance(value, Opaque) else value
    if isinstance(state, tuple) and len(state) == 2 and state[0] is None:  # copyreg: (__dict__, the slots)
        state = state[1]
    return state if isinstance(state, dict) else {}
