"""How tensors are laid out in a distributed checkpoint of torch (DCP): files of items, and ``.metadata`` to find them.

An item is the whole zip that ``torch.save`` writes of one tensor. Items may begin anywhere, since ``.metadata`` says
where each lies; here at a multiple of 64, so that the data is as aligned as it is in a torch file. Every tensor is one
chunk: whoever loads takes of it what is his, whatever the number of ranks.

Sources: ``torch/distributed/checkpoint/{filesystem,metadata,default_planner}.py`` of torch 2.13 (the classes are those
of 2.4 and later), and checkpoints that it writes. The pickle protocol is free: whoever reads calls ``pickle.load``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.plan.pickle_values import PickledCall, PickledDict, PickledName, PickledObject, PickledValue, pickled
from shardmerge.plan.shard import PlannedTensor
from shardmerge.plan.torch_layout import ALIGNMENT, TorchLayout, check_shape, lay_out_item
from shardmerge.tensors import Shape

# What leads to something in a state dict, from its top: keys of dicts, numbers of lists.
Keys: TypeAlias = "tuple[str | int, ...]"

# The table of a checkpoint, beside its files.
METADATA = ".metadata"

# A model has few types and shapes: experts by the ten thousand share the bytes around their data.
_KINDS = 4096

_CLASSES = "torch.distributed.checkpoint.metadata"
_SIZE = PickledName("torch", "Size")
_STRIDED = PickledCall(PickledName("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = PickledCall(PickledName(_CLASSES, "_MEM_FORMAT_ENCODING"), (0,))  # TORCH_CONTIGUOUS_FORMAT
_STORAGE_INFO = PickledName("torch.distributed.checkpoint.filesystem", "_StorageInfo")
# `Metadata.version` of torch 2.9 to 2.13; earlier ones do not look at it.
_VERSION = "1.0.0"


def lay_out_items(tensors: Sequence[tuple[str, DType, tuple[int, ...]]]) -> TorchLayout:
    """Returns the layout of a ``.distcp`` file, an item a tensor, with zeros up to the next.

    Parameters
    ----------
    tensors
        Name (for messages), type and shape of each, in the order of the data; at least one.

    Raises
    ------
    TargetError
        ``shape-too-large``, as ``lay_out_torch``.
    """
    start = 0
    offsets: list[int] = []
    blobs: list[tuple[int, bytes]] = []
    crc_fields: list[tuple[int, ...]] = []
    for name, dtype, shape in tensors:
        check_shape(name, shape)
        item = _item(dtype, shape)
        offsets.append(start + item.offsets[0])
        blobs += [(start + at, blob) for at, blob in item.blobs]
        crc_fields.append(tuple(start + at for at in item.crc_fields[0]))
        start += item.nbytes + _gap(item)
    return TorchLayout(start, tuple(offsets), tuple(blobs), tuple(crc_fields))


def item_span(dtype: DType, shape: tuple[int, ...], offset: int) -> tuple[int, int]:
    """Returns where the item begins whose data is at ``offset``, and its bytes: not the zeros behind it."""
    item = _item(dtype, shape)
    return offset - item.offsets[0], item.nbytes


@lru_cache(maxsize=_KINDS)
def _item(dtype: DType, shape: tuple[int, ...]) -> TorchLayout:
    """Returns an item at offset 0. Its last blob holds the zeros behind it too, its size does not."""
    item = lay_out_item(dtype, shape)
    *others, (at, last) = item.blobs
    return replace(item, blobs=(*others, (at, last + bytes(_gap(item)))))


def _gap(item: TorchLayout) -> int:
    return -item.nbytes % ALIGNMENT


@dataclass(frozen=True, slots=True)
class StoredItem:
    """Something of a checkpoint, and the item that holds it.

    Attributes
    ----------
    keys
        From the top of the state dict.
    tensor
        Its type and shape; None for an object.
    file, begin, nbytes
        The item: a file beside the table, and bytes of it.
    """

    keys: Keys
    tensor: tuple[DType, Shape] | None
    file: str
    begin: int
    nbytes: int

    @property
    def name(self) -> str:
        """Its name in the checkpoint: the keys joined by dots."""
        return ".".join(map(str, self.keys))


def stored_tensor(keys: Keys, tensor: PlannedTensor, file: str) -> StoredItem:
    """Returns a tensor of a plan as it is stored in one of its files."""
    begin, nbytes = item_span(tensor.dtype, tensor.shape, tensor.offset)
    return StoredItem(keys, (tensor.dtype, tensor.shape), file, begin, nbytes)


class ItemFile:
    """A file of small items, at multiples of 64 as all others; what is put in twice is there once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._places: dict[bytes, int] = {}
        self._data = bytearray()

    def put(self, keys: Keys, tensor: tuple[DType, Shape] | None, item: bytes) -> StoredItem:
        """Adds an item, if it is none that is there already."""
        begin = self._places.get(item)
        if begin is None:
            begin = self._places[item] = len(self._data)
            self._data += item + bytes(-len(item) % ALIGNMENT)
        return StoredItem(keys, tensor, self.name, begin, len(item))

    def content(self) -> bytes:
        """Returns the whole file."""
        return bytes(self._data)


def metadata_pickle(items: Sequence[StoredItem]) -> bytes:
    """Returns the ``.metadata`` of a checkpoint: a ``torch.distributed.checkpoint.metadata.Metadata``."""
    fields: dict[str, PickledValue] = {
        "state_dict_metadata": PickledDict((item.name, _described(item)) for item in items),
        "planner_data": PickledDict((item.name, item.keys) for item in items),
        "storage_data": PickledDict((_index(item), _place(item)) for item in items),
        "storage_meta": None,
        "version": _VERSION,
    }
    return pickled(_instance("Metadata", fields))


def _described(item: StoredItem) -> PickledObject:
    """Type, shape and chunks: one, the whole; nothing of an object."""
    if item.tensor is None:
        return _instance("BytesStorageMetadata", {})
    dtype, shape = item.tensor
    properties = PickledObject(
        PickledName(_CLASSES, "TensorProperties"),
        (PickledName("torch", dtype.torch), _STRIDED, False, _CONTIGUOUS, False),  # requires_grad, pin_memory: False
    )
    chunk = _instance("ChunkStorageMetadata", {"offsets": _origin(shape), "sizes": _size(shape)})
    fields: dict[str, PickledValue] = {"properties": properties, "size": _size(shape), "chunks": [chunk]}
    return _instance("TensorStorageMetadata", fields)


def _index(item: StoredItem) -> PickledObject:
    at: dict[str, PickledValue] = {"offset": None, "index": None}
    if item.tensor is not None:
        at = {"offset": _origin(item.tensor[1]), "index": 0}
    return _instance("MetadataIndex", {"fqn": item.name, **at})


def _place(item: StoredItem) -> PickledObject:
    fields: dict[str, PickledValue] = {"relative_path": item.file, "offset": item.begin, "length": item.nbytes}
    return PickledObject(_STORAGE_INFO, PickledDict(fields.items()))


def _origin(shape: Shape) -> PickledCall:
    return _size((0,) * len(shape))


def _size(numbers: tuple[int, ...]) -> PickledCall:
    return PickledCall(_SIZE, (numbers,))


def _instance(name: str, fields: dict[str, PickledValue]) -> PickledObject:
    return PickledObject(PickledName(_CLASSES, name), PickledDict(fields.items()))
