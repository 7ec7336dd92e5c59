"""What a pickle keeps outside of itself, by persistent id: the storages of tensors (``torch/serialization.py``)."""

from __future__ import annotations

from shardmerge.dtypes import BY_STORAGE_CLASS, DType
from shardmerge.sources.pickle_bounds import is_size
from shardmerge.sources.pickle_errors import damaged, hostile
from shardmerge.sources.pickle_values import Global, PickleValue, StorageRef, kind

# Storages of types that safetensors cannot hold: known, so that a legacy file can be stepped through.
_UNREAD_STORAGES = {
    "ComplexDoubleStorage": DType("C128", 16, "complex", "complex128", "complex128"),
    "QInt8Storage": DType("QI8", 1, "int", "int8", "qint8"),
    "QUInt8Storage": DType("QU8", 1, "int", "uint8", "quint8"),
    "QInt32Storage": DType("QI32", 4, "int", "int32", "qint32"),
    "QUInt4x2Storage": DType("QU4X2", 1, "int", "uint8", "quint4x2"),
    "QUInt2x4Storage": DType("QU2X4", 1, "int", "uint8", "quint2x4"),
}
_STORAGE_MODULES = frozenset({"torch", "torch.storage", "torch.cuda"})


def persistent(pid: PickleValue, known: dict[str, StorageRef], *, legacy: bool) -> PickleValue:
    """Returns what a persistent id stands for, and adds a storage to those that are ``known`` by key.

    ``legacy`` ids have the six fields of torch before 1.6, and may be of a module class with its source text.
    """
    fields = 6 if legacy else 5
    if isinstance(pid, tuple) and legacy and len(pid) == 4 and pid[0] == "module":
        return pid[1]
    if isinstance(pid, tuple) and len(pid) == fields and pid[0] == "storage":
        return _storage(pid, known)
    raise hostile("a persistent id is not that of a storage", kind(pid))


def _storage(pid: tuple[PickleValue, ...], known: dict[str, StorageRef]) -> StorageRef:
    cls, key, numel = pid[1], pid[2], pid[4]  # pid[3] is the device it was saved from
    if not isinstance(cls, Global) or not isinstance(key, str) or not is_size(numel):
        raise damaged("a storage is described by something else than class, key and length")
    if pid[5:] not in ((), (None,)):
        raise damaged("the file uses storage views of torch before 0.4, which are not read")
    dtype = BY_STORAGE_CLASS.get(cls.name) or _UNREAD_STORAGES.get(cls.name)
    if dtype is None or cls.module not in _STORAGE_MODULES:
        raise hostile("a storage of an unknown class", cls.path)
    ref = StorageRef(key, dtype, numel)
    if known.setdefault(key, ref) != ref:
        raise hostile("one storage is described in two ways", f"{ref.numel} of {ref.dtype}, key {key!r}")
    return ref
