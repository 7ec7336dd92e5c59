"""Shards put together again, and patterns of names, against what numpy and ``re`` make of them."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.dtypes import DTYPES
from shardmerge.errors import CheckpointError
from shardmerge.sources.affine_maps import affine_layout
from shardmerge.sources.name_patterns import NamePatterns
from shardmerge.tensors import Extent, Piece, Shape, Strided, TensorEntry
from shardmerge.tensors.shards import ShardPart, assembled, element_place, part_entry
from tests.conftest import read_entry

F32 = DTYPES["F32"]


class Store:
    """A file of elements, written as tensors are stored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(b"\xff" * 12)

    def flat(self, values: np.ndarray, cuts: list[int]) -> tuple[Piece, ...]:
        """Flat ranges, each somewhere else in the file."""
        flat = values.reshape(-1)
        ends = sorted({0, flat.size, *(cut % (flat.size + 1) for cut in cuts)})
        return tuple(Piece(a, b - a, self.put(flat[a:b])) for a, b in pairwise(ends))

    def view(self, values: np.ndarray) -> tuple[Piece, ...]:
        """The elements as a view of their transpose."""
        turned = np.ascontiguousarray(values.T)
        strides = tuple(step // 4 for step in turned.T.strides)
        return (Piece(0, values.size, Strided(self.put(turned), values.shape, strides)),)

    def put(self, values: np.ndarray) -> Extent:
        extent = Extent(str(self.path), len(self.data), values.nbytes)
        self.data += values.tobytes() + b"\xff" * 4
        self.path.write_bytes(self.data)
        return extent


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[Shape, int, list[list[int]]]:
    """A shape, the axis that is cut, and the widths of each matrix along it, by rank."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    ranks = draw(st.integers(1, 3))
    widths = draw(st.lists(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks), min_size=1, max_size=3))
    shape[axis] = sum(map(sum, widths))
    return tuple(shape), axis, widths


def cut(values: np.ndarray, axis: int, widths: list[list[int]]) -> tuple[list[np.ndarray], list[ShardPart]]:
    """The shards, and what is said of them."""
    held: list[list[np.ndarray]] = [[] for _ in widths[0]]
    parts, at = [], 0
    for row in widths:
        for rank, width in enumerate(row):
            inside = sum(piece.shape[axis] for piece in held[rank])
            held[rank].append(np.take(values, range(at, at + width), axis))
            zeros = [0] * values.ndim
            first, to = zeros.copy(), zeros.copy()
            first[axis], to[axis] = inside, at
            parts.append(ShardPart(rank, held[rank][-1].shape, tuple(first), tuple(to)))
            at += width
    return [np.concatenate(pieces, axis) for pieces in held], parts


@settings(max_examples=300, deadline=None)
@given(cutting=cuttings(), cuts=st.lists(st.integers(0, 99), max_size=3), views=st.booleans())
def test_shards_make_the_tensor_that_was_cut(
    cutting: tuple[Shape, int, list[list[int]]], cuts: list[int], views: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, axis, widths = cutting
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    store = Store(tmp_path_factory.getbasetemp() / "shards")
    arrays, parts = cut(values, axis, widths)
    shards = [
        TensorEntry("w", F32, one.shape, (store.view(one) if views else store.flat(one, cuts)) if one.size else ())
        for one in arrays
    ]
    whole = TensorEntry("w", F32, shape, assembled(F32, shape, shards, parts, "w"))
    assert np.array_equal(read_entry(whole), values)
    for index in range(0, values.size, 3):
        file, at = element_place(whole, index)
        assert np.frombuffer(Path(file).read_bytes()[at : at + 4], np.float32)[0] == index
    for part in parts:
        mine = tuple(slice(at, at + n) for at, n in zip(part.inside, part.shape, strict=True))
        assert np.array_equal(read_entry(part_entry(shards[part.rank], part)), arrays[part.rank][mine])


def test_what_several_ranks_hold_is_taken_from_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "shards")
    copies = [np.full((2, 3), rank, np.float32) for rank in range(3)]
    shards = [TensorEntry("w", F32, (2, 3), store.flat(one, [])) for one in copies]
    parts = [ShardPart(rank, (2, 3), (0, 0), (0, 0)) for rank in range(3)]
    assert np.array_equal(read_entry(TensorEntry("w", F32, (2, 3), assembled(F32, (2, 3), shards, parts))), copies[0])


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([ShardPart(0, (2, 3), (0, 0), (0, 0))], "box-hole"),
        ([ShardPart(0, (2, 3), (0, 0), (0, 0)), ShardPart(1, (2, 3), (0, 0), (1, 0))], "box-overlap"),
        ([ShardPart(0, (2, 3), (0, 0), (0, 0)), ShardPart(1, (2, 3), (0, 0), (3, 0))], "box-outside"),
        ([ShardPart(0, (2, 3), (0, 0), (0, 0)), ShardPart(1, (2, 2), (0, 0), (2, 0))], "box-hole"),
        ([ShardPart(0, (2, 3), (0, 0), (0, 0)), ShardPart(1, (2, 3), (1, 0), (2, 0))], "box-outside"),
    ],
)
def test_parts_that_do_not_tile_are_refused(parts: list[ShardPart], code: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "shards")
    shards = [TensorEntry("w", F32, (2, 3), store.flat(np.zeros((2, 3), np.float32), [])) for _ in range(2)]
    with pytest.raises(CheckpointError) as caught:
        assembled(F32, (4, 3), shards, parts, "w")
    assert caught.value.code == code


def test_a_block_of_a_map_is_a_box_or_nothing() -> None:
    def read(source: object, dest: object) -> object:
        piece = {"shape": [2, 2], "source": source, "dest": dest, "locations": [0]}
        entry = {"logical_shape": [2, 4], "ranks": {0: {"shard_shape": [2, 2], "pieces": [piece]}}}
        return affine_layout(entry, [(2, 2)])  # type: ignore[arg-type]

    assert read([2, [4, 1]], [0, [2, 1]]) == ((2, 4), (ShardPart(0, (2, 2), (0, 0), (0, 2)),), False)
    for source, dest in (
        ([3, [4, 1]], [0, [2, 1]]),  # over the end of a row
        ([-1, [4, 1]], [0, [2, 1]]),
        ([2, [4, 2]], [0, [2, 1]]),
        ([2, [4]], [0, [2, 1]]),
        ([2, [4, 1]], [1, [2, 1]]),
        ([2], [0, [2, 1]]),
        ([2.0, [4, 1]], [0, [2, 1]]),
    ):
        assert isinstance(read(source, dest), str)


# ---- patterns of names

REAL = [
    r"tied_modules.embed.word_embeddings.weight", r"\d+.self_attention.dense.bias", r"\d+.mlp.dense_h_to_4h.weight",
    r"^model\.layers\.0\.mlp\.down_proj\.weight$", r".*\.experts\.w[123]$", r"[0-9]+\.x", r"a.b", r"h\.\w+\.ln_[a-c]?$",
]  # fmt: skip
NAMES = st.lists(
    st.sampled_from(["0", "12", "model", "layers", "experts", "w1", "w4", "x", "a", "h", "ln_a", "mlp",
                     "self_attention", "dense", "bias", "weight", "down_proj", "dense_h_to_4h", "tied_modules", "embed",
                     "a\nb"]),
    min_size=1, max_size=6,
).map(".".join)  # fmt: skip
ATOMS = st.sampled_from(["a", "b", r"\d", r"\w", ".", "[ab1]", "[0-9]", r"\.", "1"])
PATTERNS = st.lists(st.tuples(ATOMS, st.sampled_from(["", "", "*", "+", "?"])).map("".join), max_size=3).map("".join)


@given(pattern=st.sampled_from(REAL) | PATTERNS, name=NAMES | st.text("ab1._", max_size=8), whole=st.booleans())
def test_patterns_match_what_re_matches(pattern: str, name: str, whole: bool) -> None:
    text = f"^{pattern}$" if whole and not pattern.endswith("$") else pattern
    found = NamePatterns.of([text], "file").find(name.replace("\n", "-"))
    assert bool(found) == bool(re.match(text, name.replace("\n", "-")))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "a|b",
        "a{3}",
        "[^a]",
        r"\b",
        r"\1",
        "(?i)a",
        "a**",
        "a+?",
        "[a",
        "[]",
        "*a",
        "\\",
        "a" * 2000,
        "a*" * 4,
    ],
)
def test_a_pattern_that_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        NamePatterns.of([pattern], "file").find("aaaa")
    assert (caught.value.code, caught.value.where) == ("name-pattern", "file")


def test_patterns_that_take_long_are_given_up() -> None:
    patterns = NamePatterns.of([".*a.*a.*ab"] * 100, "file")
    begun = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        [patterns.find("a" * size) for size in range(60, 500)]
    assert caught.value.code == "name-pattern"
    assert time.process_time() - begun < 2
