"""The ``data.pkl`` of a torch state dict, written opcode by opcode: nothing here can run or pickle anything else.

The bytes are those of ``torch.save`` of an ``OrderedDict`` of contiguous tensors, each with its own storage, on the
cpu, without gradient (pickle protocol 2; ``Tensor._reduce_ex_internal`` in ``torch/_tensor.py``, ``persistent_id`` in
``torch/serialization.py``, seen in files of torch 2.13). That includes the memo entries that nothing refers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from shardmerge.dtypes import BY_STORAGE_CLASS, DType
from shardmerge.plan.pickle_writer import PickleWriter, text_code

# The types that have a storage class of their own. The later ones (float8, uint16 to uint64) are saved as bytes, with
# the type as an argument of _rebuild_tensor_v3.
_STORAGE_CLASSES = {dtype.name: name for name, dtype in BY_STORAGE_CLASS.items() if name != "UntypedStorage"}

# pickle's own: a dict is filled a thousand items at a time.
_BATCH = 1000

_ORDERED_DICT = b"ccollections\nOrderedDict\n"
_STORAGE = text_code("storage")
_CPU = text_code("cpu")


def state_dict_pickle(tensors: Sequence[tuple[str, DType, tuple[int, ...]]]) -> bytes:
    """Returns the pickle of ``OrderedDict(name -> tensor)``; tensor number N lies in storage ``str(N)``."""
    writer = PickleWriter()
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


def tensor_pickle(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """Returns the pickle of one tensor by itself; it lies in storage ``"0"``."""
    writer = PickleWriter()
    _write_tensor(writer, "0", dtype, shape)
    return writer.finish()


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of a row-major tensor, in elements; torch counts an empty dimension as one."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _write_tensor(writer: PickleWriter, key: str, dtype: DType, shape: tuple[int, ...]) -> None:
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


def _write_storage(writer: PickleWriter, storage_class: bytes, key: str, numel: int) -> None:
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
