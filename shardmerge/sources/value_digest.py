"""A digest of a value read from a pickle, in work that grows with its objects and not with its text.

Written out, 3.4 KB of dictionaries that hold each other twice are gigabytes. Here each object is digested once, from
the digests of what it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from shardmerge.sources.pickle_values import Global, Opaque, PickleValue

# 128 bits: equal digests of unequal values are not to be feared, even from somebody who looks for them for years.
_SIZE = 16


def value_digest(value: PickleValue) -> str:
    """Returns a digest (hex) that two values share where they are equal, dicts also in the order of their keys.

    Tensors count by dtype, shape and storage key, not by their bytes. A value that holds itself is digested too.
    """
    done: dict[int, bytes] = {}  # by identity: the root holds every object, so none is freed and its number used again
    begun: set[int] = set()
    stack: list[object] = [value]
    while stack:
        item = stack[-1]
        mark = id(item)
        if mark in done or not _is_container(item):
            stack.pop()
        elif mark not in begun:
            begun.add(mark)
            stack.extend(child for child in _children(item) if _is_container(child) and id(child) not in begun)
        else:
            stack.pop()
            done[mark] = _combined(item, done)
    return _of(value, done).hex()


def _is_container(value: object) -> bool:
    return isinstance(value, (list, tuple, dict, set, Opaque))


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield item
    elif isinstance(value, Opaque):
        yield value.args
        yield value.state
        yield value.items
    elif isinstance(value, (list, tuple, set)):
        yield from value


def _combined(value: object, done: dict[int, bytes]) -> bytes:
    parts = [_of(child, done) for child in _children(value)]
    if isinstance(value, set):
        parts.sort()  # a set has no order of its own
    kind = value.type.path if isinstance(value, Opaque) else type(value).__name__
    return _hash(f"{kind} of {len(parts)}".encode(), *parts)


def _of(value: object, done: dict[int, bytes]) -> bytes:
    if _is_container(value):
        return done.get(id(value), b"a value that holds itself")
    return _hash(type(value).__name__.encode(), _leaf(value))


def _leaf(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, int):
        return hex(value).encode()  # str() refuses integers of more than 4,300 digits
    if isinstance(value, Global):
        return value.path.encode("utf-8", "surrogatepass")
    return str(value).encode("utf-8", "surrogatepass")  # str, float, complex, None, and refs with all fields


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_SIZE)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
