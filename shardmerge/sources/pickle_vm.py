"""Reads pickles without running them: an opcode interpreter over inert values.

Nothing is imported, looked up or called. A class or function that a pickle names becomes a ``Global``, what
it would build becomes an ``Opaque`` record, and only the few constructors that torch checkpoints need
(``OrderedDict``, ``torch.Size``, ``_rebuild_tensor_v2``, ...) become values of our own. An allow-list on
``pickle.Unpickler`` is no such boundary: BUILD still changes whatever object the list let through.

Opcodes are those of CPython's ``Lib/pickletools.py``; the tensor constructors those of ``torch/_utils.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TypeAlias, TypeGuard

from shardmerge.dtypes import BY_STORAGE_CLASS, BY_TORCH_NAME, DTYPES, DType
from shardmerge.errors import CheckpointError


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


# 50,000 tensors take 4.5 MB of pickle and 1.5 million opcodes, so these leave room for a million tensors.
MOST_PICKLE_BYTES = 256 << 20
_MOST_OPCODES = 32_000_000
# A container or record costs about 100 bytes: this bounds what a small hostile file can make of our memory (5 MB of
# EMPTY_DICT opcodes would be 400 MB). A tensor is 8 of them in 90 bytes of pickle, so no real file comes near.
_MOST_NODES = 10_000_000
_FREE_NODES = 1_000_000
_BYTES_A_NODE = 4
_MOST_OPEN_MARKS = 200
_MOST_DEPTH = 100
_MOST_DIMS = 64
_LONGEST_NAME = 1024
# numpy's PCG64 state holds 128-bit integers, 17 bytes with the sign; nothing known holds longer ones.
_LONGEST_INT = 32
# hash(int) is the int itself only below this modulus; above it keys can be made to collide.
_LARGEST_KEY = (1 << 61) - 2
# Hashes of tuples of integers can be made to collide, and n colliding keys cost n * n / 2 comparisons.
_MOST_TUPLE_KEYS = 5_000
_LARGEST_SIZE = (1 << 63) - 1

_SCALARS = frozenset({str, int, float, bool, bytes, NoneType})
_BYTES = DTYPES["U8"]

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


def interpret(
    data: bytes | memoryview, *, where: str, legacy: bool = False, allow_trailing: bool = False, base: int = 0
) -> PickleValue:
    """Returns the value of a pickle.

    Parameters
    ----------
    data
        The pickle, protocol 2 to 5.
    where
        The file, for errors.
    legacy
        Storages are named by the six fields of torch before 1.6.
    allow_trailing
        Bytes may follow the pickle.
    base
        Offset of ``data`` in the file, in bytes, for errors.

    Raises
    ------
    CheckpointError
        ``hostile-pickle``: an opcode, structure or size that no checkpoint needs. ``damaged-pickle``:
        malformed or cut short.
    """
    parsed = interpret_at(data, 0, where=where, legacy=legacy, base=base)
    if parsed.end != len(data) and not allow_trailing:
        raise CheckpointError(
            "hostile-pickle",
            "bytes follow the end of the pickle",
            where=f"{where}, byte {base + parsed.end}",
            found=f"{len(data) - parsed.end} more bytes",
        )
    return parsed.value


def interpret_at(data: bytes | memoryview, start: int, *, where: str, legacy: bool = False, base: int = 0) -> Parsed:
    """Returns the pickle that begins at ``data[start]``, with its end and storages; see ``interpret``."""
    machine = _Machine(bytes(data), start, legacy)
    try:
        machine.run()
        value = machine.result()
    except CheckpointError as error:
        error.where = f"{where}, byte {base + machine.op}"
        raise
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise CheckpointError(
            "damaged-pickle",
            f"the pickle is malformed: {_ACCIDENTS.get(type(error), 'a bad name or text')}",
            where=f"{where}, byte {base + machine.op}",
            hint=_AGAIN,
        ) from error
    return Parsed(value, machine.pos, machine.storages)


_AGAIN = "copy or download the file again; a checkpoint still being written looks like this too"
_ACCIDENTS: dict[type[Exception], str] = {
    IndexError: "it ends early, or takes a value that was never pushed",
    KeyError: "it refers to a memo entry that was never written",
    struct.error: "it ends inside a number",
}


def _hostile(what: str, found: str = "", expected: str = "") -> CheckpointError:
    hint = "the file is not a plain checkpoint; do not open it with torch.load either"
    return CheckpointError("hostile-pickle", what, found=found, expected=expected, hint=hint)


def _damaged(what: str, found: str = "", expected: str = "") -> CheckpointError:
    return CheckpointError("damaged-pickle", what, found=found, expected=expected, hint=_AGAIN)


def _kind(value: PickleValue) -> str:
    return value.path if isinstance(value, Global) else type(value).__name__


class _Machine:
    """The stack machine. Methods named after what they do, one for each opcode of ``_OPCODES``."""

    __slots__ = (
        "_budget", "_framed", "_legacy", "_limit", "_marks", "_memo", "_stack", "_start", "_tuple_keys",
        "data", "op", "pos", "storages",
    )  # fmt: skip

    def __init__(self, data: bytes, start: int, legacy: bool) -> None:
        self.data = data
        self.pos = self.op = self._start = start
        self.storages: dict[str, StorageRef] = {}
        self._legacy = legacy
        self._limit = min(len(data), start + MOST_PICKLE_BYTES)
        self._framed = False
        self._stack: list[PickleValue] = []
        self._marks: list[list[PickleValue]] = []
        self._memo: dict[int, PickleValue] = {}
        self._budget = min(_MOST_NODES, _FREE_NODES + (len(data) - start) // _BYTES_A_NODE)
        self._tuple_keys = 0

    def run(self) -> None:
        """Steps to the STOP opcode."""
        data = self.data
        if data[self.pos] != 0x80:
            raise _damaged("not a pickle of protocol 2 to 5", repr(data[self.pos : self.pos + 4]))
        for _ in range(_MOST_OPCODES):
            if self.pos >= self._limit:
                self._leave_frame()
            self.op = self.pos
            self.pos += 1
            opcode = data[self.op]
            if opcode == 0x2E:  # STOP
                return
            _OPCODES[opcode](self)
        raise _hostile("the pickle has more opcodes than any checkpoint", expected=f"at most {_MOST_OPCODES}")

    def result(self) -> PickleValue:
        """Returns what STOP found, if that was all there was."""
        value = self._stack.pop()
        if self._stack or self._marks:
            raise _damaged("the pickle leaves values behind", f"{len(self._stack)} on the stack")
        if self.pos > self._limit or (self._framed and self.pos != self._limit):
            raise _damaged("the pickle does not end where its frame does")
        _check_depth(value)
        return value

    # Frames, lengths and budgets

    def protocol(self) -> None:
        version = self.data[self.pos]
        if self.op != self._start or not 2 <= version <= 5:
            raise _damaged("not a pickle of protocol 2 to 5", f"PROTO {version}")
        self.pos += 1

    def frame(self) -> None:
        """PEP 3154: frames neither nest nor end inside an opcode. pickle.py and CPython 3.13.15 agree."""
        length = self._u64()
        if self._framed or length > self._limit - self.pos:
            raise _damaged("a frame nests in another or is longer than the pickle", f"{length} bytes")
        self._framed = True
        self._limit = self.pos + length

    def _leave_frame(self) -> None:
        whole = min(len(self.data), self._start + MOST_PICKLE_BYTES)
        if self.pos > self._limit:
            raise _damaged("an opcode reaches over the end of its frame or of the pickle")
        if not self._framed and whole < len(self.data):
            raise _hostile("a pickle larger than any checkpoint's", expected=f"at most {MOST_PICKLE_BYTES}")
        if self.pos >= whole:
            raise _damaged("the pickle is cut short", f"{self.pos - self._start} bytes and no STOP")
        self._framed = False
        self._limit = whole

    def _take(self, length: int) -> bytes:
        start, end = self.pos, self.pos + length
        if end > self._limit:
            raise _damaged("a length is larger than what is left", f"{length}", f"at most {self._limit - start}")
        self.pos = end
        return self.data[start:end]

    def _u8(self) -> int:
        self.pos += 1
        return self.data[self.pos - 1]

    def _u32(self) -> int:
        self.pos += 4
        number: int = _U32.unpack_from(self.data, self.pos - 4)[0]
        return number

    def _u64(self) -> int:
        self.pos += 8
        number: int = _U64.unpack_from(self.data, self.pos - 8)[0]
        return number

    def _charge(self, nodes: int = 1) -> None:
        self._budget -= nodes
        if self._budget < 0:
            raise _hostile("the pickle builds more objects than any checkpoint of its size")

    # Scalars

    def none(self) -> None:
        self._stack.append(None)

    def true(self) -> None:
        self._stack.append(True)

    def false(self) -> None:
        self._stack.append(False)

    def int1(self) -> None:
        self._stack.append(self.data[self.pos])
        self.pos += 1

    def int2(self) -> None:
        self._stack.append(_U16.unpack_from(self.data, self.pos)[0])
        self.pos += 2

    def int4(self) -> None:
        self._stack.append(_I32.unpack_from(self.data, self.pos)[0])
        self.pos += 4

    def long1(self) -> None:
        length = self._u8()
        if length > _LONGEST_INT:
            raise _hostile("an integer longer than any checkpoint needs", f"{length} bytes", f"{_LONGEST_INT}")
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def float8(self) -> None:
        self._stack.append(_F64.unpack_from(self.data, self.pos)[0])
        self.pos += 8

    def text1(self) -> None:
        self._stack.append(self._take(self._u8()).decode())

    def text4(self) -> None:
        self._stack.append(self._take(self._u32()).decode())

    def text8(self) -> None:
        self._stack.append(self._take(self._u64()).decode())

    def bytes1(self) -> None:
        self._stack.append(self._take(self._u8()))

    def bytes4(self) -> None:
        self._stack.append(self._take(self._u32()))

    def bytes8(self) -> None:
        self._stack.append(self._take(self._u64()))

    def string1(self) -> None:
        self._stack.append(_python2_text(self._take(self._u8())))

    def string4(self) -> None:
        self._stack.append(_python2_text(self._take(self._u32())))

    # Memo

    def get1(self) -> None:
        self._stack.append(self._memo[self.data[self.pos]])
        self.pos += 1

    def get4(self) -> None:
        self._stack.append(self._memo[_U32.unpack_from(self.data, self.pos)[0]])
        self.pos += 4

    def put1(self) -> None:
        self._memo[self.data[self.pos]] = self._stack[-1]
        self.pos += 1

    def put4(self) -> None:
        self._memo[_U32.unpack_from(self.data, self.pos)[0]] = self._stack[-1]
        self.pos += 4

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    # Containers

    def mark(self) -> None:
        if len(self._marks) >= _MOST_OPEN_MARKS:
            raise _hostile("values nest deeper than in any checkpoint", expected=f"{_MOST_OPEN_MARKS} marks")
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[PickleValue]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def empty_tuple(self) -> None:
        self._stack.append(())

    def tuple1(self) -> None:
        self._charge()
        self._stack[-1:] = [(self._stack[-1],)]

    def tuple2(self) -> None:
        self._charge()
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def tuple3(self) -> None:
        self._charge()
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def tuple_of_mark(self) -> None:
        self._charge()
        items = tuple(self._pop_mark())
        self._stack.append(items)

    def empty_list(self) -> None:
        self._charge()
        self._stack.append([])

    def empty_dict(self) -> None:
        self._charge()
        self._stack.append({})

    def empty_set(self) -> None:
        self._charge()
        self._stack.append(set())

    def frozen_set(self) -> None:
        self._charge()
        items = {self._key(item) for item in self._pop_mark()}
        self._stack.append(items)

    def append(self) -> None:
        self._extend([self._stack.pop()])

    def append_all(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[PickleValue]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Opaque):
            target.items.extend(items)
        else:
            raise _hostile("values are appended to something that is not a list", _kind(target))

    def set_item(self) -> None:
        value = self._stack.pop()
        self._set_pairs([self._stack.pop(), value])

    def set_items(self) -> None:
        self._set_pairs(self._pop_mark())

    def _set_pairs(self, items: list[PickleValue]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise _damaged("a dict entry has no value")
        if isinstance(target, dict):
            for at in range(0, len(items), 2):
                target[self._key(items[at])] = items[at + 1]
        elif isinstance(target, Opaque):
            self._charge(len(items) // 2)
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        else:
            raise _hostile("items are set on something that is not a dict", _kind(target))

    def add_items(self) -> None:
        items = self._pop_mark()
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(self._key(item) for item in items)
        elif isinstance(target, Opaque):
            target.items.extend(items)
        else:
            raise _hostile("items are added to something that is not a set", _kind(target))

    def _key(self, value: PickleValue) -> object:
        """Returns a value that is safe to hash. Of nested tuples that recurses in C, in exponential time."""
        if isinstance(value, tuple):
            self._tuple_keys += 1
            if len(value) > 8 or self._tuple_keys > _MOST_TUPLE_KEYS:
                raise _hostile("tuples longer or more than in any checkpoint are used as keys")
            for item in value:
                if type(item) not in _SCALARS:
                    raise _hostile("a nested tuple is used as a key", _kind(item))
                self._key(item)
            return value
        if type(value) not in _SCALARS and not isinstance(value, Global | Opaque):
            raise _damaged("a value that cannot be hashed is used as a key", _kind(value))
        if isinstance(value, int) and abs(value) > _LARGEST_KEY:
            raise _hostile("an integer too large for a key", expected="at most 61 bits")
        return value

    # Names, constructors and persistent ids

    def global_name(self) -> None:
        self._charge()
        module = self._line()
        self._stack.append(Global(module, self._line()))

    def _line(self) -> str:
        end = self.data.index(b"\n", self.pos, min(self._limit, self.pos + _LONGEST_NAME))
        text = self.data[self.pos : end].decode()
        self.pos = end + 1
        return text

    def stack_global(self) -> None:
        self._charge()
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _damaged("a class is named by something that is not text", _kind(name))
        self._stack.append(Global(module, name))

    def reduce(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._construct(function, args, _CONSTRUCTORS))

    def new_object(self) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        self._stack.append(self._construct(cls, args, _CONTAINERS))

    def new_object_ex(self) -> None:
        keywords, args, cls = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if not isinstance(args, tuple):
            raise _damaged("arguments are not a tuple", _kind(args))
        self._stack.append(self._construct(cls, (*args, keywords), {}))

    def _construct(
        self, function: PickleValue, args: PickleValue, known: dict[tuple[str, str], _Constructor]
    ) -> PickleValue:
        if not isinstance(args, tuple):
            raise _damaged("arguments are not a tuple", _kind(args))
        self._charge()
        if isinstance(function, Opaque):  # the result of getattr and the like, called
            return Opaque(function.type, (function, *args))
        if not isinstance(function, Global):
            raise _hostile("something that is not a class or function is called", _kind(function))
        constructor = known.get((function.module, function.name))
        return constructor(self, function, args) if constructor else Opaque(function, args)

    def build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, dict):  # of a dict only attributes: the _metadata of a state dict
            raise _hostile("state is set on something that is not an object", _kind(target))

    def persistent_id(self) -> None:
        self._charge()
        pid = self._stack.pop()
        fields = 6 if self._legacy else 5
        if isinstance(pid, tuple) and self._legacy and len(pid) == 4 and pid[0] == "module":
            self._stack.append(pid[1])  # a pickled module class, with its source text
        elif isinstance(pid, tuple) and len(pid) == fields and pid[0] == "storage":
            self._stack.append(self._storage(pid))
        else:
            raise _hostile("a persistent id is not that of a storage", _kind(pid))

    def _storage(self, pid: tuple[PickleValue, ...]) -> PickleValue:
        cls, key, numel = pid[1], pid[2], pid[4]  # pid[3] is the device it was saved from
        if not isinstance(cls, Global) or not isinstance(key, str) or not _is_size(numel):
            raise _damaged("a storage is described by something else than class, key and length")
        if pid[5:] not in ((), (None,)):
            raise _damaged("the file uses storage views of torch before 0.4, which are not read")
        dtype = BY_STORAGE_CLASS.get(cls.name) or _UNREAD_STORAGES.get(cls.name)
        if dtype is None or cls.module not in _STORAGE_MODULES:
            raise _hostile("a storage of an unknown class", cls.path)
        ref = StorageRef(key, dtype, numel)
        if self.storages.setdefault(key, ref) != ref:
            raise _hostile("one storage is described in two ways", f"{ref.numel} of {ref.dtype}, key {key!r}")
        return ref

    def refuse(self) -> None:
        opcode = self.data[self.op]
        name = _REFUSED.get(opcode, "unknown")
        raise _hostile("an opcode that no checkpoint needs", f"{name}, {opcode:#04x}")

    # What the known constructors build

    def mapping(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        """``OrderedDict([[key, value], ...])``, ``defaultdict(factory)``, ``Counter({...})``; or no args."""
        source = args[0] if args else []
        if function.name == "defaultdict":
            return {}
        if isinstance(source, dict):
            self._charge(len(source))
            return dict(source)
        if len(args) > 1 or not isinstance(source, list):
            raise _damaged("a dict is made of something else than pairs", _kind(source))
        return self._paired(source)

    def _paired(self, pairs: list[PickleValue]) -> PickleValue:
        self._charge(len(pairs))
        made: dict[object, PickleValue] = {}
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise _damaged("a dict is made of something else than pairs", _kind(pair))
            made[self._key(pair[0])] = pair[1]
        return made

    def set_of(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        items = args[0] if args else []
        if not isinstance(items, list | tuple):
            return Opaque(function, args)
        self._charge(len(items))
        return {self._key(item) for item in items}

    def size(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        sizes = args[0] if args else ()
        if len(args) > 1 or not _are_sizes(sizes):
            raise _damaged("torch.Size is made of something else than sizes", function.path)
        return tuple(sizes)

    def encoded(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        """``_codecs.encode``: bytes in protocol 2. Other codecs may import, and some are quadratic."""
        if len(args) != 2 or not isinstance(args[0], str) or not isinstance(args[1], str):
            return Opaque(function, args)
        codec = _CODECS.get(args[1])
        if codec is None:
            return Opaque(function, args)
        self._charge(len(args[0]) // 100)
        return args[0].encode(codec)

    def bytes_of(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        """``bytes()``, the empty bytes of protocol 2."""
        return Opaque(function, args) if args else b""

    def tensor_v1(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        return self._tensor(function, args, 4, None)

    def tensor_v2(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        return self._tensor(function, args, 6, None)

    def tensor_v3(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        dtype = args[6] if len(args) > 6 else None
        if not isinstance(dtype, Global):
            raise _damaged("a tensor's element type is not named")
        known = BY_TORCH_NAME.get(dtype.name) if dtype.module == "torch" else None
        return self._tensor(function, args, 7, known) if known else Opaque(function, args)

    def _tensor(self, function: Global, args: tuple[PickleValue, ...], needed: int, dtype: DType | None) -> PickleValue:
        if len(args) != needed and (needed == 4 or len(args) != needed + 1):
            raise _damaged("a tensor with the wrong number of arguments", f"{len(args)}", f"{needed}")
        storage, offset, shape, strides = args[:4]
        if not isinstance(storage, StorageRef) or not _is_size(offset):
            raise _damaged("a tensor is made of something else than a storage and an offset", _kind(storage))
        if not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
            raise _damaged("a tensor's shape and strides are not lists of sizes of one length")
        if storage.dtype.name not in DTYPES or (len(args) > needed and not _is_plain(args[needed])):
            return Opaque(function, args)
        return TensorRef(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))

    def parameter(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        """``_rebuild_parameter[_with_state](tensor, requires_grad, hooks[, state])`` is its tensor."""
        return args[0] if args and isinstance(args[0], TensorRef) else Opaque(function, args)

    def device_tensor(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        """``_rebuild_device_tensor_from_cpu_tensor(tensor, dtype, device, ...)``, where it casts nothing."""
        tensor = args[0] if len(args) == 4 else None
        if isinstance(tensor, TensorRef) and args[1] == Global("torch", tensor.dtype.torch):
            return tensor
        return Opaque(function, args)

    def from_type(self, function: Global, args: tuple[PickleValue, ...]) -> PickleValue:
        """``_rebuild_from_type_v2(function, type, args, state)``: with attributes, or of a subclass."""
        if len(args) == 4 and isinstance(args[0], Global) and isinstance(args[2], tuple):
            constructor = _TENSORS.get((args[0].module, args[0].name))
            made = constructor(self, args[0], args[2]) if constructor else None
            if isinstance(made, TensorRef):
                return made
        return Opaque(function, args)


def _is_plain(metadata: PickleValue) -> bool:
    """Tells whether metadata changes nothing: dropping ``{'conj': True}`` would give wrong values."""
    if metadata is None:
        return True
    return isinstance(metadata, dict) and set(metadata) <= {"conj", "neg"} and not any(metadata.values())


def _is_size(value: PickleValue) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _LARGEST_SIZE


def _are_sizes(values: PickleValue) -> TypeGuard[Sequence[int]]:
    if not isinstance(values, tuple | list) or len(values) > _MOST_DIMS:
        return False
    for value in values:  # noqa: SIM110  # a generator costs more, and this runs twice for every tensor
        if type(value) is not int or not 0 <= value <= _LARGEST_SIZE:
            return False
    return True


def _python2_text(raw: bytes) -> str | bytes:
    """Python 2 wrote names and raw bytes alike."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _check_depth(root: PickleValue) -> None:
    """Refuses values that nest deeper than anyone should walk; each is visited once, so cycles end."""
    seen: set[int] = set()
    level: list[PickleValue] = [root]
    for _ in range(_MOST_DEPTH + 1):
        below: list[PickleValue] = []
        for value in level:
            if isinstance(value, _CHECKED) and id(value) not in seen:
                seen.add(id(value))
                below.extend(_children(value))
        if not below:
            return
        level = below
    raise _hostile("values nest deeper than in any checkpoint", expected=f"at most {_MOST_DEPTH} levels")


_CHECKED = (list, tuple, dict, Opaque)


def _children(value: PickleValue) -> Sequence[PickleValue]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, Opaque):
        return [value.args, value.state, value.items]
    return value if isinstance(value, list | tuple) else ()


_Constructor: TypeAlias = Callable[[_Machine, Global, tuple[PickleValue, ...]], PickleValue]

_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_F64 = struct.Struct(">d")

_CODECS = {
    "latin1": "latin-1", "latin-1": "latin-1", "iso-8859-1": "latin-1", "ascii": "ascii", "utf-8": "utf-8",
    "utf8": "utf-8",
}  # fmt: skip

# Protocol 2 writes the builtins module under its Python 2 name.
_CONTAINERS: dict[tuple[str, str], _Constructor] = {
    ("collections", "OrderedDict"): _Machine.mapping,
    ("collections", "defaultdict"): _Machine.mapping,
    ("collections", "Counter"): _Machine.mapping,
    ("torch", "Size"): _Machine.size,
    ("__builtin__", "set"): _Machine.set_of,
    ("builtins", "set"): _Machine.set_of,
    ("__builtin__", "frozenset"): _Machine.set_of,
    ("builtins", "frozenset"): _Machine.set_of,
}

_TENSORS: dict[tuple[str, str], _Constructor] = {
    ("torch._utils", "_rebuild_tensor"): _Machine.tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _Machine.tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _Machine.tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _Machine.parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Machine.parameter,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _Machine.device_tensor,
}

_CONSTRUCTORS: dict[tuple[str, str], _Constructor] = {
    **_CONTAINERS,
    **_TENSORS,
    ("torch._tensor", "_rebuild_from_type_v2"): _Machine.from_type,
    ("_codecs", "encode"): _Machine.encoded,
    ("__builtin__", "bytes"): _Machine.bytes_of,
    ("builtins", "bytes"): _Machine.bytes_of,
}

_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol, 0x95: _Machine.frame, 0x4E: _Machine.none, 0x88: _Machine.true,
    0x89: _Machine.false, 0x4B: _Machine.int1, 0x4D: _Machine.int2, 0x4A: _Machine.int4, 0x8A: _Machine.long1,
    0x47: _Machine.float8, 0x8C: _Machine.text1, 0x58: _Machine.text4, 0x8D: _Machine.text8,
    0x43: _Machine.bytes1, 0x42: _Machine.bytes4, 0x8E: _Machine.bytes8, 0x96: _Machine.bytes8,
    0x55: _Machine.string1, 0x54: _Machine.string4, 0x68: _Machine.get1, 0x6A: _Machine.get4,
    0x71: _Machine.put1, 0x72: _Machine.put4, 0x94: _Machine.memoize, 0x28: _Machine.mark,
    0x29: _Machine.empty_tuple, 0x85: _Machine.tuple1, 0x86: _Machine.tuple2, 0x87: _Machine.tuple3,
    0x74: _Machine.tuple_of_mark, 0x5D: _Machine.empty_list, 0x7D: _Machine.empty_dict,
    0x8F: _Machine.empty_set, 0x91: _Machine.frozen_set, 0x61: _Machine.append, 0x65: _Machine.append_all,
    0x73: _Machine.set_item, 0x75: _Machine.set_items, 0x90: _Machine.add_items, 0x63: _Machine.global_name,
    0x93: _Machine.stack_global, 0x52: _Machine.reduce, 0x81: _Machine.new_object,
    0x92: _Machine.new_object_ex, 0x62: _Machine.build, 0x51: _Machine.persistent_id,
}  # fmt: skip

_OPCODES = tuple(_HANDLERS.get(opcode, _Machine.refuse) for opcode in range(256))

# Names for the message; what is not listed is no opcode at all.
_REFUSED = {
    0x69: "INST", 0x6F: "OBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x50: "PERSID", 0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER", 0x49: "INT", 0x4C: "LONG", 0x46: "FLOAT", 0x53: "STRING", 0x56: "UNICODE",
    0x32: "DUP", 0x30: "POP", 0x31: "POP_MARK", 0x8B: "LONG4", 0x67: "GET", 0x70: "PUT", 0x6C: "LIST",
    0x64: "DICT",
}  # fmt: skip
