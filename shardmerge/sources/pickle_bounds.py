"""How much a pickle may make of our memory and time: objects, keys of dictionaries, sizes, depth."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import TypeGuard

from shardmerge.sources.pickle_errors import damaged, hostile
from shardmerge.sources.pickle_values import Global, Opaque, PickleValue, kind

# A container or record costs about 100 bytes: this bounds what a small hostile file can make of our memory (5 MB of
# EMPTY_DICT opcodes would be 400 MB). A tensor is 8 of them in 90 bytes of pickle, so no real file comes near: those of
# training runs have 10 bytes a node and 9 a memo.
_MOST_NODES = 10_000_000
_FREE_NODES = 100_000
_BYTES_A_NODE = 4
_MOST_DEPTH = 100
# hash(int) is the int itself only below this modulus; above it keys can be made to collide.
_LARGEST_KEY = (1 << 61) - 2
# Hashes of tuples of integers can be made to collide, and n colliding keys cost n * n / 2 comparisons.
_MOST_TUPLE_KEYS = 5_000

MOST_DIMS = 64
_LARGEST_SIZE = (1 << 63) - 1

_SCALARS = frozenset({str, int, float, bool, bytes, NoneType})
_NESTING = (list, tuple, dict, Opaque)


class Budget:
    """What a pickle of ``size`` bytes may still build; ``memos`` is how many values it may memoize."""

    __slots__ = ("_nodes", "_tuple_keys", "memos")

    def __init__(self, size: int) -> None:
        self._nodes = self.memos = min(_MOST_NODES, _FREE_NODES + size // _BYTES_A_NODE)
        self._tuple_keys = 0

    def charge(self, nodes: int = 1) -> None:
        """Takes off so many containers or records."""
        self._nodes -= nodes
        if self._nodes < 0:
            raise hostile("the pickle builds more objects than any checkpoint of its size")

    def key(self, value: PickleValue) -> object:
        """Returns a value that is safe to hash. Of nested tuples that recurses in C, in exponential time."""
        if isinstance(value, tuple):
            self._tuple_keys += 1
            if len(value) > 8 or self._tuple_keys > _MOST_TUPLE_KEYS:
                raise hostile("tuples longer or more than in any checkpoint are used as keys")
            for item in value:
                if type(item) not in _SCALARS:
                    raise hostile("a nested tuple is used as a key", kind(item))
                self.key(item)
            return value
        if type(value) not in _SCALARS and not isinstance(value, Global | Opaque):
            raise damaged("a value that cannot be hashed is used as a key", kind(value))
        if isinstance(value, int) and abs(value) > _LARGEST_KEY:
            raise hostile("an integer too large for a key", expected="at most 61 bits")
        return value


def check_depth(root: PickleValue) -> None:
    """Refuses values that nest deeper than anyone should walk; each is visited once, so cycles end."""
    seen: set[int] = set()
    level: list[PickleValue] = [root]
    for _ in range(_MOST_DEPTH + 1):
        below: list[PickleValue] = []
        for value in level:
            if isinstance(value, _NESTING) and id(value) not in seen:
                seen.add(id(value))
                below.extend(_children(value))
        if not below:
            return
        level = below
    raise hostile("values nest deeper than in any checkpoint", expected=f"at most {_MOST_DEPTH} levels")


def _children(value: PickleValue) -> Sequence[PickleValue]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, Opaque):
        return [value.args, value.state, value.items]
    return value if isinstance(value, list | tuple) else ()


def is_size(value: PickleValue) -> TypeGuard[int]:
    """Tells whether a value is a whole number from 0 to the largest of 64 bits."""
    return type(value) is int and 0 <= value <= _LARGEST_SIZE


def are_sizes(values: PickleValue) -> TypeGuard[Sequence[int]]:
    """Tells whether a value is a list of sizes, of no more axes than torch's tensors have."""
    if not isinstance(values, tuple | list) or len(values) > MOST_DIMS:
        return False
    for value in values:  # noqa: SIM110  # a generator costs more, and this runs twice for every tensor
        if type(value) is not int or not 0 <= value <= _LARGEST_SIZE:
            return False
    return True
