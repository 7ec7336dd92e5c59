"""Values of foreign classes as a pickle, of names alone: nothing of theirs is imported, nothing runs.

Strings and names are written once and referred to after that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias, Union

from shardmerge.plan.pickle_writer import PickleWriter, text_code

# pickle's own: a dict is filled a thousand items at a time.
BATCH = 1000


@dataclass(frozen=True, slots=True)
class PickledName:
    """A class, a function or a constant of a module, by its name."""

    module: str
    name: str

    @property
    def code(self) -> bytes:
        """The opcode that finds it."""
        return f"c{self.module}\n{self.name}\n".encode()


@dataclass(frozen=True, slots=True)
class PickledCall:
    """What a function returns for some arguments: ``torch.Size((3, 5))``."""

    function: PickledName
    arguments: tuple[PickledValue, ...]


@dataclass(frozen=True, slots=True)
class PickledObject:
    """An object made without arguments, and its state: a dataclass and the dict of its fields."""

    kind: PickledName
    state: PickledValue


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """A storage of a torch file, by its persistent id: ``("storage", class, key, "cpu", elements)``."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class PickledDict:
    """A dict whose items come one at a time, so that a table of a large model is never held as objects."""

    items: Iterable[tuple[PickledValue, PickledValue]]


PickledValue: TypeAlias = Union[
    None, bool, int, float, str, PickledName, PickledCall, PickledObject, PickledStorage, PickledDict,
    "tuple[PickledValue, ...]", "list[PickledValue]",
]  # fmt: skip


def pickled(value: PickledValue) -> bytes:
    """Returns a value as a pickle of protocol 2."""
    writer = PickleWriter()
    write_value(writer, value)
    return writer.finish()


def write_value(writer: PickleWriter, value: PickledValue) -> None:
    """Writes one value; opcodes as in ``pickletools``."""
    if isinstance(value, str):
        writer.once(text_code(value))
    elif isinstance(value, PickledName):
        writer.once(value.code)
    elif isinstance(value, bool) or value is None:
        writer.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
    elif isinstance(value, int):
        writer.number(value)
    elif isinstance(value, float):
        writer.write(struct.pack(">cd", b"G", value))  # BINFLOAT
    elif isinstance(value, (tuple, list)):
        _write_sequence(writer, value)
    elif isinstance(value, PickledCall):
        write_value(writer, value.function)
        write_value(writer, value.arguments)
        writer.write(b"R")
    elif isinstance(value, PickledObject):
        write_value(writer, value.kind)
        writer.write(b")\x81")  # NEWOBJ, with no arguments
        write_value(writer, value.state)
        writer.write(b"b")
    elif isinstance(value, PickledStorage):
        write_value(writer, ("storage", PickledName("torch", value.kind), value.key, "cpu", value.numel))
        writer.write(b"Q")
    else:
        _write_dict(writer, value)


def _write_sequence(writer: PickleWriter, values: tuple[PickledValue, ...] | list[PickledValue]) -> None:
    writer.write(b"(" if isinstance(values, tuple) else b"](")
    for one in values:
        write_value(writer, one)
    writer.write(b"t" if isinstance(values, tuple) else b"e")


def _write_dict(writer: PickleWriter, value: PickledDict) -> None:
    writer.write(b"}")
    items = iter(value.items)
    while batch := list(islice(items, BATCH)):
        writer.write(b"(")
        for key, one in batch:
            write_value(writer, key)
            write_value(writer, one)
        writer.write(b"u")
