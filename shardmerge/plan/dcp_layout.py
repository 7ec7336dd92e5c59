"""How tensors are laid out in a distributed checkpoint of torch (DCP): files of items, and ``.metadata`` to find them.

An item is the whole zip that ``torch.save`` writes of one tensor. Items may begin anywhere, since ``.metadata`` says
where each lies; here at a multiple of 64, so that the data is as aligned as it is in a torch file. Every tensor is one
chunk: whoever loads takes of it what is his, whatever the number of ranks.

Sources: ``torch/distributed/checkpoint/{filesystem,metadata,default_planner}.py`` of torch 2.13 (the classes are those
of 2.4 and later), and checkpoints that it writes. The pickle protocol is free: whoever reads calls ``pickle.load``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from shardmerge.dtypes import DType
from shardmerge.plan.pickle_values import PickledCall, PickledDict, PickledName, PickledObject, PickledValue, pickled
from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.plan.torch_layout import ALIGNMENT, TorchLayout, check_shape, lay_out_item

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


def metadata_pickle(shards: Sequence[PlannedShard], root: tuple[str, ...]) -> bytes:
    """Returns the ``.metadata`` of a checkpoint: a ``torch.distributed.checkpoint.metadata.Metadata``.

    Parameters
    ----------
    shards
        All files of the directory.
    root
        The keys under which a state dict holds the model: ``("model",)`` for ``dcp.load({"model": ...})``.
    """
    items = list(_items(shards, root))
    fields: dict[str, PickledValue] = {
        "state_dict_metadata": PickledDict((key, _described(tensor)) for key, tensor, _ in items),
        "planner_data": PickledDict((key, (*root, tensor.stored)) for key, tensor, _ in items),
        "storage_data": PickledDict((_index(key, tensor), _place(tensor, file)) for key, tensor, file in items),
        "storage_meta": None,
        "version": _VERSION,
    }
    return pickled(_instance("Metadata", fields))


def _items(shards: Sequence[PlannedShard], root: tuple[str, ...]) -> Iterator[tuple[str, PlannedTensor, str]]:
    """Yields every tensor with its name in the checkpoint, the path joined by dots, and its file beside the table."""
    for shard in shards:
        file = shard.name.rpartition("/")[2]
        yield from ((".".join((*root, tensor.stored)), tensor, file) for tensor in shard.tensors)


def _described(tensor: PlannedTensor) -> PickledObject:
    """Type, shape and chunks: one, the whole."""
    dtype = PickledName("torch", tensor.dtype.torch)
    properties = PickledObject(
        PickledName(_CLASSES, "TensorProperties"),
        (dtype, _STRIDED, False, _CONTIGUOUS, False),  # the False: requires_grad, pin_memory
    )
    chunk = _instance("ChunkStorageMetadata", {"offsets": _origin(tensor), "sizes": _size(tensor.shape)})
    fields: dict[str, PickledValue] = {"properties": properties, "size": _size(tensor.shape), "chunks": [chunk]}
    return _instance("TensorStorageMetadata", fields)


def _index(key: str, tensor: PlannedTensor) -> PickledObject:
    return _instance("MetadataIndex", {"fqn": key, "offset": _origin(tensor), "index": 0})


def _place(tensor: PlannedTensor, file: str) -> PickledObject:
    start, nbytes = item_span(tensor.dtype, tensor.shape, tensor.offset)
    fields: dict[str, PickledValue] = {"relative_path": file, "offset": start, "length": nbytes}
    return PickledObject(_STORAGE_INFO, PickledDict(fields.items()))


def _origin(tensor: PlannedTensor) -> PickledCall:
    return _size((0,) * len(tensor.shape))


def _size(numbers: tuple[int, ...]) -> PickledCall:
    return PickledCall(_SIZE, (numbers,))


def _instance(name: str, fields: dict[str, PickledValue]) -> PickledObject:
    return PickledObject(PickledName(_CLASSES, name), PickledDict(fields.items()))
