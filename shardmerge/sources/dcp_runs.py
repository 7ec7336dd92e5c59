"""Chunks and items of a ``.metadata`` as they stand in its pickle, many in a row, each read by one match.

The pickle of a large model is the same forty bytes again and again: a chunk is ``NEWOBJ, BUILD`` of two sizes, an item
of a name, a size, a file and two numbers (classes and keys of ``torch/distributed/checkpoint/metadata.py`` and
``filesystem.py``; CPython's pickler, protocols 4 and 5). A chunk and its item took 84 us of CPU opcode by opcode, and
take 17 us so (of 555,264). What is written in any other way does not match, and is read opcode by opcode.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

from shardmerge.sources.pickle_bounds import MOST_DIMS

_INT = rb"(?:K.|M..|J.{4}|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_GET = rb"(?:h.|j.{4})"
# torch.Size: REDUCE of a tuple, of which only the empty one is not memoized.
_SIZE = rb"%b(?:\)|%b\x85\x94|%b{2}\x86\x94|%b{3}\x87\x94|\(%b{4,64}t\x94)\x85\x94R\x94" % (_GET, *(_INT,) * 4)
_TEXT = rb"\x8c.[^\x94]{0,255}\x94"
_OBJECT = rb"(%b)\)\x81\x94\}\x94\(" % _GET  # its class; EMPTY_TUPLE NEWOBJ, EMPTY_DICT, MARK
_VALUE = rb"%b|%b|%b|N|%b" % (_SIZE, _TEXT, _INT, _GET)
_BUILT = rb"ub"

CHUNK = re.compile(rb"%b(%b)(%b|%b)(%b)(%b|%b)%b" % (_OBJECT, _GET, _SIZE, _GET, _GET, _SIZE, _GET, _BUILT), re.DOTALL)
# A key and its value, of MetadataIndex one to three, of _StorageInfo three or four.
_FIELD = rb"(%b)(%b)" % (_GET, _VALUE)
ITEM = re.compile(
    rb"%b%b(?:%b(?:%b)?)?%b%b%b%b%b(?:%b)?%b" % (_OBJECT, *(_FIELD,) * 3, _BUILT, _OBJECT, *(_FIELD,) * 4, _BUILT),
    re.DOTALL,
)
INDEX_FIELDS, INFO_FIELDS = slice(1, 7), slice(8, 16)

# What an object and its state add to the memo, and what a size does: tuple, arguments, and the size itself.
OBJECT_MEMOS = 2

_GETS = (0x68, 0x6A)
_INT_SIZES = {0x4B: 2, 0x4D: 3, 0x4A: 5, 0x8A: 0}  # LONG1 says its own
# A class, an empty tuple and its REDUCE; a get alone is shorter.
_SHORTEST_SIZE = 7
# Layers are alike: of a million boxes there are as many sizes as ranks and kinds of matrices.
_MOST_SIZES = 1 << 13
_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")

# Returns what a BINGET or LONG_BINGET brings.
Recall: TypeAlias = Callable[[bytes], object]


class NoMatchError(Exception):
    """The bytes look like a row and are none; never leaves the reader."""


def memo_number(get: bytes) -> int:
    """Returns the number of a BINGET or LONG_BINGET."""
    return get[1] if get[0] == 0x68 else int(_U32.unpack_from(get, 1)[0])


@lru_cache(maxsize=_MOST_SIZES)
def size_of(raw: bytes) -> tuple[tuple[int, ...], int]:
    """Returns the numbers of a size, and how many memos it adds; none of either for one that is recalled."""
    if len(raw) < _SHORTEST_SIZE:
        return (), 0
    at = 2 if raw[0] == 0x68 else 5  # behind the class
    at += raw[at] == 0x28  # MARK
    found: list[int] = []
    while (opcode := raw[at]) in _INT_SIZES:
        end = at + (2 + raw[at + 1] if opcode == 0x8A else _INT_SIZES[opcode])
        found.append(int_of(raw[at:end]))
        at = end
    if min(found, default=0) < 0 or len(found) > MOST_DIMS:
        raise NoMatchError
    return tuple(found), 3 if found else 2


def int_of(raw: bytes) -> int:
    """Returns the number that an opcode pushes."""
    opcode = raw[0]
    if opcode == 0x4B:
        return raw[1]
    number: int
    if opcode == 0x4D:
        (number,) = _U16.unpack_from(raw, 1)
    elif opcode == 0x4A:
        (number,) = _I32.unpack_from(raw, 1)
    else:
        number = int.from_bytes(raw[2:], "little", signed=True)
    return number


def state_of(fields: Sequence[bytes | None], recall: Recall) -> tuple[dict[object, object], int]:
    """Returns the state of an object, of keys and values in turn, and how many memos its values add.

    Raises
    ------
    NoMatchError
        A key or a value is another one than it looked like.
    """
    state: dict[object, object] = {}
    memos = 0
    for key, raw in zip(fields[::2], fields[1::2], strict=True):
        if key is None or raw is None:
            break
        opcode = raw[0]
        value: object = None
        if opcode == 0x8C:
            value, memos = _text(raw), memos + 1
        elif opcode in _GETS:
            value, added = size_of(raw)
            memos += added
            if not added:
                value = recall(raw)
        elif opcode != 0x4E:
            value = int_of(raw)
        state[_name(recall(key))] = value
    return state, memos


def _name(value: object) -> str:
    """Returns the key of a state; a value that is none may not even be hashable."""
    if isinstance(value, str):
        return value
    raise NoMatchError


def _text(raw: bytes) -> str:
    try:
        if raw[1] == len(raw) - 3:
            return raw[2:-1].decode()
    except UnicodeDecodeError:
        pass
    raise NoMatchError
