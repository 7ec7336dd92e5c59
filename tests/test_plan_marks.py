"""Two tensors have one mark exactly when they hold the same elements at the same places, however the moves say it.

All elements of the sources have different values, so the bytes of a tensor tell where each of them comes from.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from math import prod
from pathlib import Path

import numpy as np
import pytest

from shardmerge.compose import cast_to, compose
from shardmerge.dtypes import DTYPES
from shardmerge.execute.gather import Assembler
from shardmerge.ops.arrays import Array
from shardmerge.ops.written import op_class
from shardmerge.plan import marks as marks_module
from shardmerge.plan import places as places_module
from shardmerge.plan import walks
from shardmerge.plan.marks import Marks
from shardmerge.plan.places import Shares, places
from shardmerge.plan.walks import Walk, cut, folded, last, unfolded, whole
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Box, Extent, Piece, TensorEntry
from shardmerge.tensors.boxes import boxed
from shardmerge.tensors.ranks import Partition, RankChunks
from shardmerge.tensors.strides import row_major
from tests.small_plans import Store

Shape = tuple[int, ...]


def op(name: str, *values: object, **named: object):
    return op_class(name)(*values, **named)


# ---- walks, against all of their elements


def elements(walk: Walk) -> dict[int, tuple[int, ...]]:
    """Says by place which element a walk comes to, loop by loop."""
    found = {}
    for turn in product(*(range(n) for n, _, _ in walk.loops)):
        at = walk.at + sum(i * out for i, (_, out, _) in zip(turn, walk.loops, strict=True))
        steps = [steps for _, _, steps in walk.loops]
        found[at] = tuple(
            first + sum(i * each[axis] for i, each in zip(turn, steps, strict=True))
            for axis, first in enumerate(walk.index)
        )
    return found


def random_walk(rng: random.Random) -> Walk:
    loops, out = [], 1
    for _ in range(rng.randint(0, 3)):
        n = rng.randint(2, 6)
        loops.append((n, out, (rng.choice([0, 1, 1, 2, 3, 4, 5, 6, 7, 12]),)))
        out *= n
    rng.shuffle(loops)
    return Walk(rng.randint(0, 3), (rng.randint(0, 20),), tuple(loops))


def together(parts: Sequence[Walk]) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for part in parts:
        some = elements(part)
        assert not found.keys() & some.keys()
        found |= some
    return found


def test_walks_are_cut_and_unfolded_as_their_elements_are() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        walk = random_walk(rng)
        every = elements(walk)
        low = rng.randint(0, 60)
        high = low + rng.randint(0, 60)
        inside = {at: index for at, index in every.items() if low <= index[0] < high}
        assert together(list(cut(walk, 0, low, high))) == inside
        shape = [rng.randint(1, 6) for _ in range(rng.randint(1, 4))]
        while prod(shape) <= last(walk, 0):
            shape[rng.randrange(len(shape))] += 1
        parts = list(unfolded(walk, tuple(shape)))
        found = together(parts)
        assert {at: tuple(np.unravel_index(index[0], shape)) for at, index in every.items()} == found
        assert together([folded(part, 5, row_major(tuple(shape))) for part in parts]) == {
            at: (index[0] + 5,) for at, index in every.items()
        }


def test_a_walk_counts_loops_and_not_elements() -> None:
    """A large matrix, and a part of one that begins and ends in the middle of rows, are a few walks."""
    assert len(list(unfolded(whole(1 << 40), (1 << 20, 1 << 20)))) == 1
    (part,) = cut(whole(1 << 40), 0, 12345, (1 << 40) - 54321)
    assert len(list(unfolded(part, (1 << 20, 1 << 10, 1 << 10)))) <= 5
    by_columns = Walk(0, (0,), ((1 << 20, 1 << 20, (1,)), (1 << 20, 1, (1 << 20,))))
    assert len(list(unfolded(by_columns, (1 << 10, 1 << 10, 1 << 20)))) == 1


# ---- all moves of a small tensor


def menu(shape: Shape) -> Iterator[object]:
    """Yields moves that a tensor of a shape can be given to, of every kind."""
    rank, numel = len(shape), prod(shape)
    yield op("Reshape", (numel,))
    yield op("Unsqueeze", 0)
    if rank > 1:
        yield op("Transpose", 0, -1)
        yield op("Permute", tuple(range(rank))[::-1])
        yield op("Permute", (*range(1, rank), 0))
    for rows in (2, 3, 4):
        if numel % rows == 0:
            yield op("Reshape", (rows, numel // rows))
    for dim in {0, rank - 1}:
        n = shape[dim]
        if n == 1:
            yield op("Squeeze", dim)
        if n > 1:
            yield op("Slice", dim, 1, None)
            yield op("Slice", dim, 0, n - 1)
            yield op("Split", dim, (1, n - 1), 1)
        if n % 2 == 0:
            yield op("Chunk", dim, 2, 0)
            yield op("Slice", dim, n // 2, n)
    if shape[0] % 4 == 0:
        yield op("Rotary", 2, inverse=False)
        yield op("Rotary", 2, inverse=True)
        yield op("GroupedSplit", 2, (shape[0] // 4, shape[0] // 4), 1)


def joins(entry: TensorEntry) -> Iterator[TensorEntry]:
    """Yields a tensor cut along an axis and put together again, in its order and turned around, and beside itself."""
    for dim in range(len(entry.shape)):
        n = entry.shape[dim]
        if n > 1:
            parts = [compose(op("Slice", dim, low, high), [entry]) for low, high in ((0, n // 2), (n // 2, n))]
            yield compose(op("Concat", dim), parts)
            yield compose(op("Concat", dim), parts[::-1])
            one, *more = [compose(op("Slice", dim, i, i + 1), [entry]) for i in range(n)]
            yield compose(op("Concat", dim), [compose(op("Concat", dim), [one, *more[:1]]), *more[1:]])
    yield compose(op("Concat", 0), [entry])
    yield compose(op("Stack", 0), [entry])
    yield compose(op("Stack", len(entry.shape)), [entry, entry])
    if entry.shape[0] % 2 == 0:
        halves = [compose(op("Chunk", 0, 2, i), [entry]) for i in range(2)]
        yield compose(op("GroupedMerge", 1, (entry.shape[0] // 2,) * 2), halves)


def made_of(entry: TensorEntry, depth: int) -> Iterator[TensorEntry]:
    """Yields a tensor and all that moves make of it, so many deep."""
    yield entry
    if depth and entry.shape:
        for move in menu(entry.shape):
            yield from made_of(compose(move, [entry]), depth - 1)
        for joined in joins(entry):
            yield from made_of(joined, depth - 1)


def numbered(shape: Shape, first: int = 0, dtype: type = np.float32) -> Array:
    return np.arange(first, first + prod(shape)).reshape(shape).astype(dtype)


def checked(entries: Sequence[TensorEntry], names: Callable[[str], str] = str) -> tuple[int, int]:
    """Checks that elements and marks tell the same tensors apart; returns how many there are, and how many differ."""
    by_bytes, by_mark = defaultdict(set), defaultdict(set)
    marks, assembler = Marks(names), Assembler(FilePool())
    for entry in entries:
        out = bytearray(entry.nbytes)
        assembler.fill(entry, 0, memoryview(out))
        data, mark = bytes(out), marks.of(entry)
        by_bytes[data].add(mark)
        by_mark[mark].add(data)
    assert all(len(found) == 1 for found in by_bytes.values())
    assert all(len(found) == 1 for found in by_mark.values())
    return len(entries), len(by_bytes)


@pytest.mark.parametrize("way", Store.WAYS)
def test_all_moves_of_moves_are_told_apart_exactly(way: str, tmp_path: Path) -> None:
    entries = list(made_of(Store(tmp_path).put(numbered((4, 6)), way), 2))
    count, different = checked(entries)
    print(f"{way}: {count} tensors, {different} different")
    assert count > 2 * different > 200


@pytest.mark.parametrize("way", Store.WAYS)
def test_random_moves_of_several_sources(way: str, tmp_path: Path) -> None:
    """Up to six deep, of two tensors, and casts on the way; numbers up to 256 keep their value in every type."""
    rng = random.Random(way)
    store = Store(tmp_path)
    sources = [store.put(numbered((4, 2, 3)), way, "a"), store.put(numbered((4, 2, 3), 24), "pieces", "b")]
    found = []
    for _ in range(400):
        pool = list(sources)
        for _ in range(rng.randint(1, 6)):
            one = rng.choice(pool)
            if not one.shape:
                continue
            alike = [other for other in pool if other.shape == one.shape and other.dtype == one.dtype]
            choices = [lambda one=one: compose(rng.choice(list(menu(one.shape))), [one])]
            choices += [lambda one=one: rng.choice(list(joins(one)))]
            choices += [lambda one=one, alike=alike: compose(op("Concat", 0), [one, rng.choice(alike)])]
            pool.append(rng.choice(choices)())
        last_one = pool[-1]
        found.append(last_one)
        if rng.random() < 0.3:
            found.append(cast_to(last_one, DTYPES["BF16"]))
    count, different = checked([one for one in found if one.numel <= 400])
    assert count > different > 100


def test_casts_go_through_moves(tmp_path: Path) -> None:
    entry = Store(tmp_path).put(numbered((4, 6)), "pieces")
    turned = op("Transpose", 0, 1)
    halves = [compose(op("Chunk", 1, 2, i), [entry]) for i in range(2)]
    same = [
        cast_to(compose(turned, [entry]), DTYPES["BF16"]),
        compose(turned, [cast_to(entry, DTYPES["BF16"])]),
        compose(turned, [compose(op("Concat", 1), [cast_to(half, DTYPES["BF16"]) for half in halves])]),
        cast_to(compose(turned, [compose(op("Concat", 1), halves)]), DTYPES["BF16"]),
    ]
    marks = Marks(str)
    assert len({marks.of(one) for one in same}) == 1
    twice = cast_to(cast_to(entry, DTYPES["F16"]), DTYPES["BF16"])
    assert (
        len({marks.of(one) for one in (entry, cast_to(entry, DTYPES["BF16"]), cast_to(entry, DTYPES["F16"]), twice)})
        == 4
    )


# ---- what holds the elements


def test_pieces_beside_each_other_are_one(tmp_path: Path) -> None:
    extent = Store(tmp_path).extent(numbered((24,)).tobytes())
    cuts = ((0, 24), (0, 5, 24), (0, 1, 2, 3, 24), range(25))
    ways = [tuple(Piece(a, b - a, extent.slice(4 * a, 4 * (b - a))) for a, b in pairwise(cut)) for cut in cuts]
    rows = [Box((at, 0), (n, 6), extent.slice(24 * at, 24 * n)) for at, n in ((0, 1), (1, 3))]
    ways.append(boxed(DTYPES["F32"], (4, 6), rows))
    entries = [TensorEntry("t", DTYPES["F32"], (4, 6), pieces) for pieces in ways]
    assert checked(entries) == (5, 1)


@pytest.mark.parametrize("world", [1, 2, 8, 9, 64])
def test_a_rule_of_ranks_is_its_pieces(world: int, tmp_path: Path) -> None:
    """Whatever stands around it: the sum over all ranks is that of the pieces one by one."""
    store = Store(tmp_path)
    rule = TensorEntry("t", DTYPES["F32"], (10, 10), store._ranks(numbered((100,)), numbered((100,)), world))
    listed = TensorEntry("t", DTYPES["F32"], (10, 10), tuple(rule.pieces))
    other = store.put(numbered((10, 10), 100))
    ways = []
    for one in (rule, listed):
        both = compose(op("Concat", 0), [other, one])
        ways.append(
            [one, both, cast_to(one, DTYPES["BF16"]), cast_to(both, DTYPES["F16"]), compose(op("Transpose"), [one])]
        )
    assert any(isinstance(place, Shares) for place in places(rule))
    assert not any(isinstance(place, Shares) for place in places(listed))
    marks = Marks(str)
    assert [marks.of(one) for one in ways[0]] == [marks.of(one) for one in ways[1]]
    assert checked([*ways[0][:2], *ways[1][:2]])[1] == 2


@pytest.mark.parametrize("rows", [(10,), (4, 4, 2), (3, 3, 3, 1), (1, 5, 2, 2)])
def test_ranges_are_their_pieces(rows: Sequence[int], tmp_path: Path) -> None:
    """A tensor cut into rows as FSDP cuts it, even or not, files in any order: the sum is that of the pieces."""
    store = Store(tmp_path)
    data = numbered((10, 10))
    firsts = [sum(rows[:i]) for i in range(len(rows))]
    held = {low: store.extent(data[low : low + n].tobytes()) for low, n in reversed([*zip(firsts, rows, strict=True)])}
    boxes = [Box((low, 0), (n, 10), held[low]) for low, n in zip(firsts, rows, strict=True)]
    ranges = TensorEntry("t", DTYPES["F32"], (10, 10), boxed(DTYPES["F32"], (10, 10), boxes))
    listed = TensorEntry("t", DTYPES["F32"], (10, 10), tuple(ranges.pieces))
    other = store.put(numbered((10, 10), 100))
    ways = [
        [one, both, cast_to(one, DTYPES["BF16"]), cast_to(both, DTYPES["F16"]), compose(op("Slice", 0, 2, 9), [one])]
        for one in (ranges, listed)
        for both in [compose(op("Concat", 0), [other, one])]
    ]
    assert any(isinstance(place, Shares) for place in places(ranges)) is (len(rows) > 1)
    assert not any(isinstance(place, Shares) for place in places(listed))
    marks = Marks(str)
    assert [marks.of(one) for one in ways[0]] == [marks.of(one) for one in ways[1]]
    assert checked([*ways[0][:2], *ways[1][:2]])[1] == 2


def test_ranks_are_told_apart_by_all_that_says_where_they_are(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rule = store._ranks(numbered((100,)), numbered((100,)), 9)
    assert isinstance(rule, RankChunks)
    first, *more = rule.partitions
    moved = Partition(Extent(first.extent.file, first.extent.offset + 4, first.extent.nbytes), first.numel)
    rules = [
        rule,
        RankChunks(rule.partitions, 4, 1, 100),
        RankChunks(rule.partitions, 4, 2, 99),
        RankChunks((moved, *more), 4, 2, 100),
        RankChunks((*more, first), 4, 2, 100),
        RankChunks((Partition(more[0].extent, first.numel), *more), 4, 2, 100),
        RankChunks((*more, first)[1:], 4, 2, 98),
    ]
    marks = Marks(str)
    assert len({marks.of(TensorEntry("t", DTYPES["F32"], (one.numel,), one)) for one in rules}) == len(rules)


def test_frozen_fragments_are_told_apart_by_their_files_too(tmp_path: Path) -> None:
    """The table of offsets may be one and the same: ranks mostly have one layout."""
    frozen = Store(tmp_path)._frozen(numbered((16,)), numbered((16,))).partitions
    other = type(frozen)(tuple(f"{file}x" for file in frozen.files), frozen.offsets, 1, frozen.numel, 4)
    marks = Marks(str)
    found = [
        marks.of(TensorEntry("t", DTYPES["F32"], (16,), RankChunks(one, 4, 0, 16))) for one in (frozen, other, frozen)
    ]
    assert found[0] == found[2] != found[1]


def test_a_view_that_is_not_taken_apart_is_told_apart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 7 read in rows of 6: with no room for all the parts the view itself is compared, as it is written."""
    entry = Store(tmp_path).put(numbered((7, 6)), "pieces")
    turned = compose(op("Transpose"), [compose(op("Reshape", (7, 6)), [compose(op("Transpose"), [entry])])])
    ways = [entry, turned, compose(op("Slice", 0, 1, None), [turned]), compose(op("Slice", 0, 0, 5), [turned])]
    assert checked(ways) == (4, 4)
    through = [Marks(str).of(one) for one in ways]
    for module in (walks, places_module):
        monkeypatch.setattr(module, "MOST", 2)
    assert checked(ways) == (4, 4)
    assert [Marks(str).of(one) for one in ways][1:] != through[1:]


def test_what_is_empty_and_what_is_one_number(tmp_path: Path) -> None:
    store = Store(tmp_path)
    marks = Marks(str)
    empty = store.put(numbered((0, 6)))
    one = store.put(numbered(()))
    assert marks.of(empty) == marks.of(compose(op("Transpose"), [empty])) == 0
    wide = store.put(numbered((2, 6)))
    beside = [compose(op("Concat", 0), parts) for parts in ([wide], [empty, wide], [wide, empty, empty])]
    assert len({marks.of(each) for each in beside}) == 1
    scalar = compose(op("Reshape", ()), [compose(op("Unsqueeze", 0), [one])])
    assert marks.of(scalar) == marks.of(one) != 0


# ---- numbers


def test_powers_and_series_are_those_of_the_formula() -> None:
    prime = marks_module.PRIME
    base = marks_module._mark("base")
    power = marks_module._Powers(base)
    rng = random.Random(0)
    for exponent in (0, 1, 31, 32, 33, 1 << 40, *(rng.randrange(1 << 60) for _ in range(50))):
        assert power(exponent) == pow(base, exponent, prime)
    for n, out, step in ((2, 1, 4), (5, 7, 0), (9, 3, 2)):
        ratio = marks_module._S(step) * marks_module._R(out) % prime
        assert marks_module._series((n, out, (step,))) == sum(pow(ratio, i, prime) for i in range(n)) % prime


def test_the_modulus_is_a_prime() -> None:
    """By Lucas and Lehmer, as it was found in 1952."""
    value, prime = 4, marks_module.PRIME
    for _ in range(521 - 2):
        value = (value * value - 2) % prime
    assert value == 0
