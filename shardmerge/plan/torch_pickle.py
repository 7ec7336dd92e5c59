"""The ``data.pkl`` of a torch state dict, written opcode by opcode: nothing here can run or pickle anything else.

The bytes are those of ``torch.save`` of an ``OrderedDict`` of contiguous tensors, each with its own storage, on the
cpu, without gradient (pickle protocol 2; ``Tensor._reduce_ex_internal`` in ``torch/_tensor.py``, ``persistent_id`` in
``torch/serialization.py``, seen in files of torch 2.13). That includes the memo entries that nothing refers to.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod

from shardmerge.dtypes import BY_STORAGE_CLASS, DType

# The types that have a storage class of their own. The later ones (float8, uint16 to uint64) are saved as bytes, with
# the type as an argument of _rebuild_tensor_v3.
_STORAGE_CLASSES = {dtype.name: name for name, dtype in BY_STORAGE_CLASS.items() if name != "UntypedStorage"}

# pickle's own: a dict is filled a thousand items at a time.
_BATCH = 1000

_ORDERED_DICT = b"ccollections\nOrderedDict\n"


def state_dict_pickle(tensors: Sequence[tuple[str, DType, tuple[int, ...]]]) -> bytes:
    """Returns the pickle of ``OrderedDict(name -> tensor)``; tensor number N lies in storage ``str(N)``."""
    writer = _Writer()
    writer.once(_ORDERED_DICT)
    writer.write(b")R")  # called with no arguments
    writer.keep()
    for first in range(0, len(tensors), _BATCH):
        batch = tensors[first : first + _BATCH]
        writer.write(b"(" if len(batch) > 1 else b"")
        for key, (name, dtype, shape) in enumerate(batch, first):
            writer.text(name)
            _write_tensor(writer, str(key), dtype, shape)
        writer.write(b"u" if len(batch) > 1 else b"s")
    return writer.finish()


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of a row-major tensor, in elements; torch counts an empty dimension as one."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _write_tensor(writer: _Writer, key: str, dtype: DType, shape: tuple[int, ...]) -> None:
    """Writes the call that makes one tensor: function, arguments as a tuple, REDUCE."""
    storage = _STORAGE_CLASSES.get(dtype.name)
    writer.once(b"ctorch._utils\n_rebuild_tensor_v2\n" if storage else b"ctorch._utils\n_rebuild_tensor_v3\n")
    writer.write(b"(")
    if storage:
        _write_storage(writer, b"ctorch\n%s\n" % storage.encode(), key, prod(shape))
    else:
        _write_storage(writer, b"ctorch.storage\nUntypedStorage\n", key, prod(shape) * dtype.itemsize)
    writer.number(0)  # where in the storage it begins
    writer.numbers(shape)
    writer.numbers(contiguous_strides(shape))
    writer.write(b"\x89")  # requires_grad: False
    writer.once(_ORDERED_DICT)  # backward hooks: none
    writer.write(b")R")
    writer.keep()
    if not storage:
        writer.once(b"ctorch\n%s\n" % dtype.torch.encode())
    writer.write(b"t")
    writer.keep()
    writer.write(b"R")
    writer.keep()


def _write_storage(writer: _Writer, storage_class: bytes, key: str, numel: int) -> None:
    """Writes the persistent id ``("storage", class, key, "cpu", numel)``."""
    writer.write(b"(")
    writer.once(_STORAGE)
    writer.once(storage_class)
    writer.text(key)
    writer.once(_CPU)
    writer.number(numel)
    writer.write(b"t")
    writer.keep()
    writer.write(b"Q")


def _text(text: str) -> bytes:
    """BINUNICODE; like pickle, it carries even the surrogates that a file name may have brought in."""
    raw = text.encode("utf-8", "surrogatepass")
    return b"X%s%s" % (struct.pack("<I", len(raw)), raw)


_STORAGE = _text("storage")
_CPU = _text("cpu")


class _Writer:
    """A pickle of protocol 2 in the making; opcodes as in ``pickletools``."""

    __slots__ = ("_kept", "_known", "_out", "write")

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._known: dict[bytes, int] = {}
        self._kept = 0
        self.write = self._out.extend

    def keep(self) -> None:
        """Puts the top of the stack in the memo (BINPUT, LONG_BINPUT)."""
        self.write(b"q%c" % self._kept if self._kept < 256 else b"r%s" % struct.pack("<I", self._kept))
        self._kept += 1

    def once(self, code: bytes) -> None:
        """Writes an object the first time, and after that a reference to it (BINGET, LONG_BINGET)."""
        index = self._known.get(code)
        if index is None:
            self._known[code] = self._kept
            self.write(code)
            self.keep()
        else:
            self.write(b"h%c" % index if index < 256 else b"j%s" % struct.pack("<I", index))

    def text(self, text: str) -> None:
        """Writes a string."""
        self.write(_text(text))
        self.keep()

    def number(self, number: int) -> None:
        """Writes a number >= 0 (BININT1, BININT2, BININT, LONG1)."""
        if number < 1 << 8:
            self.write(b"K%c" % number)
        elif number < 1 << 16:
            self.write(struct.pack("<cH", b"M", number))
        elif number < 1 << 31:
            self.write(struct.pack("<ci", b"J", number))
        else:
            width = number.bit_length() // 8 + 1
            self.write(b"\x8a%c%s" % (width, number.to_bytes(width, "little", signed=True)))

    def numbers(self, numbers: tuple[int, ...]) -> None:
        """Writes a tuple of numbers (EMPTY_TUPLE, TUPLE1 to TUPLE3, MARK and TUPLE)."""
        if not numbers:
            self.write(b")")
            return
        self.write(b"(" if len(numbers) > 3 else b"")
        for number in numbers:
            self.number(number)
        self.write(b"\x85\x86\x87"[len(numbers) - 1 : len(numbers)] if len(numbers) <= 3 else b"t")
        self.keep()

    def finish(self) -> bytes:
        """Returns the whole pickle."""
        self.write(b".")
        return bytes(self._out)
