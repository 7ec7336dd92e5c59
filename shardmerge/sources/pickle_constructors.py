"""The few constructors that torch checkpoints need, by name, and what each makes of its arguments.

The tensor constructors are those of ``torch/_utils.py``. Arguments that a constructor does not understand leave an
``Opaque`` record; nothing is ever called by the name that stands in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from shardmerge.dtypes import BY_TORCH_NAME, DTYPES, DType
from shardmerge.sources.pickle_bounds import Budget, are_sizes, is_size
from shardmerge.sources.pickle_errors import damaged, hostile
from shardmerge.sources.pickle_values import Global, Opaque, PickleValue, StorageRef, TensorRef, kind

Constructor: TypeAlias = Callable[[Budget, Global, tuple[PickleValue, ...]], PickleValue]
Constructors: TypeAlias = dict[tuple[str, str], Constructor]

# Attributes of torch.Tensor that can be set and then change what it holds.
_VALUES = frozenset({"data", "imag", "real"})

_CODECS = {
    "latin1": "latin-1", "latin-1": "latin-1", "iso-8859-1": "latin-1", "ascii": "ascii", "utf-8": "utf-8",
    "utf8": "utf-8",
}  # fmt: skip


def _mapping(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    """``OrderedDict([[key, value], ...])``, ``defaultdict(factory)``, ``Counter({...})``; or no args."""
    source = args[0] if args else []
    if function.name == "defaultdict":
        return {}
    if isinstance(source, dict):
        budget.charge(len(source))
        return dict(source)
    if len(args) > 1 or not isinstance(source, list):
        raise damaged("a dict is made of something else than pairs", kind(source))
    return _paired(budget, source)


def _paired(budget: Budget, pairs: list[PickleValue]) -> PickleValue:
    budget.charge(len(pairs))
    made: dict[object, PickleValue] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise damaged("a dict is made of something else than pairs", kind(pair))
        made[budget.key(pair[0])] = pair[1]
    return made


def _set_of(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    items = args[0] if args else []
    if not isinstance(items, list | tuple):
        return Opaque(function, args)
    budget.charge(len(items))
    return {budget.key(item) for item in items}


def _size(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    sizes = args[0] if args else ()
    if len(args) > 1 or not are_sizes(sizes):
        raise damaged("torch.Size is made of something else than sizes", function.path)
    return tuple(sizes)


def _encoded(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    """``_codecs.encode``: bytes in protocol 2. Other codecs may import, and some are quadratic."""
    if len(args) != 2 or not isinstance(args[0], str) or not isinstance(args[1], str):
        return Opaque(function, args)
    codec = _CODECS.get(args[1])
    if codec is None:
        return Opaque(function, args)
    budget.charge(len(args[0]) // 100)
    return args[0].encode(codec)


def _bytes_of(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    """``bytes()``, the empty bytes of protocol 2."""
    return Opaque(function, args) if args else b""


def _tensor_v1(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    return _tensor(function, args, 4, None)


def _tensor_v2(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    return _tensor(function, args, 6, None)


def _tensor_v3(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    dtype = args[6] if len(args) > 6 else None
    if not isinstance(dtype, Global):
        raise damaged("a tensor's element type is not named")
    known = BY_TORCH_NAME.get(dtype.name) if dtype.module == "torch" else None
    return _tensor(function, args, 7, known) if known else Opaque(function, args)


def _tensor(function: Global, args: tuple[PickleValue, ...], needed: int, dtype: DType | None) -> PickleValue:
    if len(args) != needed and (needed == 4 or len(args) != needed + 1):
        raise damaged("a tensor with the wrong number of arguments", f"{len(args)}", f"{needed}")
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, StorageRef) or not is_size(offset):
        raise damaged("a tensor is made of something else than a storage and an offset", kind(storage))
    if not are_sizes(shape) or not are_sizes(strides) or len(shape) != len(strides):
        raise damaged("a tensor's shape and strides are not lists of sizes of one length")
    if storage.dtype.name not in DTYPES or (len(args) > needed and not _is_plain(args[needed])):
        return Opaque(function, args)
    return TensorRef(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))


def _parameter(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    """``_rebuild_parameter[_with_state](tensor, requires_grad, hooks[, state])`` is its tensor."""
    _check_attributes(args[3] if len(args) > 3 else None)
    return args[0] if args and isinstance(args[0], TensorRef) else Opaque(function, args)


def _device_tensor(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    """``_rebuild_device_tensor_from_cpu_tensor(tensor, dtype, device, ...)``, where it casts nothing."""
    tensor = args[0] if len(args) == 4 else None
    if isinstance(tensor, TensorRef) and args[1] == Global("torch", tensor.dtype.torch):
        return tensor
    return Opaque(function, args)


def _from_type(budget: Budget, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
    """``_rebuild_from_type_v2(function, type, args, state)``: with attributes, or of a subclass."""
    if len(args) == 4 and isinstance(args[0], Global) and isinstance(args[2], tuple):
        _check_attributes(args[3])
        constructor = _TENSORS.get((args[0].module, args[0].name))
        made = constructor(budget, args[0], args[2]) if constructor else None
        if isinstance(made, TensorRef):
            return made
    return Opaque(function, args)


def _check_attributes(state: PickleValue) -> None:
    """Refuses attributes that are a tensor's values: torch sets them one by one once the tensor is made."""
    for attributes in state if isinstance(state, tuple) else (state,):
        odd = _VALUES & attributes.keys() if isinstance(attributes, dict) else frozenset()
        if odd:
            raise hostile("an attribute of a tensor replaces its values", ", ".join(sorted(map(str, odd))))


def _is_plain(metadata: PickleValue) -> bool:
    """Tells whether metadata changes nothing: dropping ``{'conj': True}`` would give wrong values."""
    if metadata is None:
        return True
    return isinstance(metadata, dict) and set(metadata) <= {"conj", "neg"} and not any(metadata.values())


# Protocol 2 writes the builtins module under its Python 2 name.
CONTAINERS: Constructors = {
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): _mapping,
    ("collections", "Counter"): _mapping,
    ("torch", "Size"): _size,
    ("__builtin__", "set"): _set_of,
    ("builtins", "set"): _set_of,
    ("__builtin__", "frozenset"): _set_of,
    ("builtins", "frozenset"): _set_of,
}

_TENSORS: Constructors = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _device_tensor,
}

CONSTRUCTORS: Constructors = {
    **CONTAINERS,
    **_TENSORS,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("_codecs", "encode"): _encoded,
    ("__builtin__", "bytes"): _bytes_of,
    ("builtins", "bytes"): _bytes_of,
}
