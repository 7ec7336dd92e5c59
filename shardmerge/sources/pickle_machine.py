"""The opcodes of a pickle, one by one: what each does to the stack, the memo and the marks.

Opcodes are those of CPython's ``Lib/pickletools.py``. What no checkpoint needs is refused.
"""
# ruff: noqa: D102  # the methods are the opcodes, which pickletools describes

from __future__ import annotations

import struct
from collections.abc import Callable

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_bounds import Budget, check_depth
from shardmerge.sources.pickle_constructors import CONSTRUCTORS, CONTAINERS, Constructors
from shardmerge.sources.pickle_errors import damaged, hostile
from shardmerge.sources.pickle_frames import Cursor
from shardmerge.sources.pickle_storages import persistent
from shardmerge.sources.pickle_values import Global, Opaque, PickleValue, StorageRef, kind

# 50,000 tensors take 1.5 million opcodes, so this leaves room for a million tensors.
MOST_OPCODES = 32_000_000
_MOST_OPEN_MARKS = 200
_LONGEST_NAME = 1024
# numpy's PCG64 state holds 128-bit integers, 17 bytes with the sign; nothing known holds longer ones.
_LONGEST_INT = 32

_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_F64 = struct.Struct(">d")


class Machine(Cursor):
    """The stack machine; a method for each opcode, named after what it does."""

    __slots__ = (
        "_budget",
        "_charge",
        "_key",
        "_legacy",
        "_marks",
        "_memo",
        "_most_memos",
        "_skipped",
        "_stack",
        "storages",
    )

    def __init__(self, data: bytes, start: int, legacy: bool) -> None:
        super().__init__(data, start)
        self.storages: dict[str, StorageRef] = {}
        self._legacy = legacy
        self._stack: list[PickleValue] = []
        self._marks: list[list[PickleValue]] = []
        self._memo: dict[int, PickleValue] = {}
        self._skipped = 0  # values that were numbered and are not in the memo
        self._allow(len(data) - start)

    def _allow(self, size: int) -> None:
        """Sets what a pickle of so many bytes may build."""
        self._budget = Budget(size)
        self._charge, self._key, self._most_memos = self._budget.charge, self._budget.key, self._budget.memos

    def run(self) -> None:
        """Steps to the STOP opcode."""
        data = self.data
        if data[self.pos] != 0x80:
            raise damaged("not a pickle of protocol 2 to 5", repr(data[self.pos : self.pos + 4]))
        for _ in range(MOST_OPCODES):
            if self.pos >= self._limit:
                self._leave_frame()
            self.op = self.pos
            self.pos += 1
            opcode = data[self.op]
            if opcode == 0x2E:  # STOP
                return
            OPCODES[opcode](self)
        raise too_many_opcodes()

    def result(self) -> PickleValue:
        """Returns what STOP found, if that was all there was."""
        value = self._stack.pop()
        if self._stack or self._marks:
            raise damaged("the pickle leaves values behind", f"{len(self._stack)} on the stack")
        self._check_end()
        check_depth(value)
        return value

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
            raise hostile("an integer longer than any checkpoint needs", f"{length} bytes", f"{_LONGEST_INT}")
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
        self._note()

    def _note(self) -> int:
        """Memoizes the top of the stack under the next number. The opcode is 1 byte, what it takes of memory 100."""
        kept = len(self._memo)
        if kept >= self._most_memos:
            raise hostile("the pickle memoizes more values than any checkpoint of its size")
        number = kept + self._skipped
        self._memo[number] = self._stack[-1]
        return number

    # Containers

    def mark(self) -> None:
        if len(self._marks) >= _MOST_OPEN_MARKS:
            raise hostile("values nest deeper than in any checkpoint", expected=f"{_MOST_OPEN_MARKS} marks")
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
            raise hostile("values are appended to something that is not a list", kind(target))

    def set_item(self) -> None:
        value = self._stack.pop()
        self._set_pairs([self._stack.pop(), value])

    def set_items(self) -> None:
        self._set_pairs(self._pop_mark())

    def _set_pairs(self, items: list[PickleValue]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise damaged("a dict entry has no value")
        if isinstance(target, dict):
            for at in range(0, len(items), 2):
                target[self._key(items[at])] = items[at + 1]
        elif isinstance(target, Opaque):
            self._charge(len(items) // 2)
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        else:
            raise hostile("items are set on something that is not a dict", kind(target))

    def add_items(self) -> None:
        items = self._pop_mark()
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(self._key(item) for item in items)
        elif isinstance(target, Opaque):
            target.items.extend(items)
        else:
            raise hostile("items are added to something that is not a set", kind(target))

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
            raise damaged("a class is named by something that is not text", kind(name))
        self._stack.append(Global(module, name))

    def reduce(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._construct(function, args, CONSTRUCTORS))

    def new_object(self) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        self._stack.append(self._construct(cls, args, CONTAINERS))

    def new_object_ex(self) -> None:
        keywords, args, cls = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if not isinstance(args, tuple):
            raise damaged("arguments are not a tuple", kind(args))
        self._stack.append(self._construct(cls, (*args, keywords), {}))

    def _construct(self, function: PickleValue, args: PickleValue, known: Constructors) -> PickleValue:
        if not isinstance(args, tuple):
            raise damaged("arguments are not a tuple", kind(args))
        self._charge()
        if isinstance(function, Opaque):  # the result of getattr and the like, called
            return Opaque(function.type, (function, *args))
        if not isinstance(function, Global):
            raise hostile("something that is not a class or function is called", kind(function))
        constructor = known.get((function.module, function.name))
        return constructor(self._budget, function, args) if constructor else Opaque(function, args)

    def build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, dict):  # of a dict only attributes: the _metadata of a state dict
            raise hostile("state is set on something that is not an object", kind(target))

    def persistent_id(self) -> None:
        self._charge()
        self._stack.append(persistent(self._stack.pop(), self.storages, legacy=self._legacy))

    def refuse(self) -> None:
        opcode = self.data[self.op]
        name = _REFUSED.get(opcode, "unknown")
        raise hostile("an opcode that no checkpoint needs", f"{name}, {opcode:#04x}")


def too_many_opcodes() -> CheckpointError:
    """Returns the error for a pickle that does not come to an end."""
    return hostile("the pickle has more opcodes than any checkpoint", expected=f"at most {MOST_OPCODES}")


def _python2_text(raw: bytes) -> str | bytes:
    """Python 2 wrote names and raw bytes alike."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


_HANDLERS: dict[int, Callable[[Machine], None]] = {
    0x80: Machine.protocol, 0x95: Machine.frame, 0x4E: Machine.none, 0x88: Machine.true,
    0x89: Machine.false, 0x4B: Machine.int1, 0x4D: Machine.int2, 0x4A: Machine.int4, 0x8A: Machine.long1,
    0x47: Machine.float8, 0x8C: Machine.text1, 0x58: Machine.text4, 0x8D: Machine.text8,
    0x43: Machine.bytes1, 0x42: Machine.bytes4, 0x8E: Machine.bytes8, 0x96: Machine.bytes8,
    0x55: Machine.string1, 0x54: Machine.string4, 0x68: Machine.get1, 0x6A: Machine.get4,
    0x71: Machine.put1, 0x72: Machine.put4, 0x94: Machine.memoize, 0x28: Machine.mark,
    0x29: Machine.empty_tuple, 0x85: Machine.tuple1, 0x86: Machine.tuple2, 0x87: Machine.tuple3,
    0x74: Machine.tuple_of_mark, 0x5D: Machine.empty_list, 0x7D: Machine.empty_dict,
    0x8F: Machine.empty_set, 0x91: Machine.frozen_set, 0x61: Machine.append, 0x65: Machine.append_all,
    0x73: Machine.set_item, 0x75: Machine.set_items, 0x90: Machine.add_items, 0x63: Machine.global_name,
    0x93: Machine.stack_global, 0x52: Machine.reduce, 0x81: Machine.new_object,
    0x92: Machine.new_object_ex, 0x62: Machine.build, 0x51: Machine.persistent_id,
}  # fmt: skip

OPCODES = tuple(_HANDLERS.get(opcode, Machine.refuse) for opcode in range(256))

# Names for the message; what is not listed is no opcode at all.
_REFUSED = {
    0x69: "INST", 0x6F: "OBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x50: "PERSID", 0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER", 0x49: "INT", 0x4C: "LONG", 0x46: "FLOAT", 0x53: "STRING", 0x56: "UNICODE",
    0x32: "DUP", 0x30: "POP", 0x31: "POP_MARK", 0x8B: "LONG4", 0x67: "GET", 0x70: "PUT", 0x6C: "LIST",
    0x64: "DICT",
}  # fmt: skip
