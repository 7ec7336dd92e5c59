"""Laws that every op obeys, whatever lies behind its inputs: extents, pieces, strided views, other ops.

* what ``infer`` says is what the engine makes;
* a move, compiled, is ``Move.apply`` on whole arrays, and ``apply`` is what torch does where torch has the op;
* arithmetic is the same bits however it is cut;
* an op and its inverse are the identity, bit for bit;
* nothing takes more memory than planned.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.compose import compose
from shardmerge.dtypes import DTYPES, DType
from shardmerge.execute.gather import Assembler
from shardmerge.ops.arrays import Array, as_array, numpy_dtype
from shardmerge.ops.contract import Gathered, Meta, Mirror, Move, Op, OpKind, ParamValue, Scattered
from shardmerge.ops.cutting import Chunk, Slice, Split
from shardmerge.ops.heads import GroupedMerge, GroupedSplit, Rotary
from shardmerge.ops.joining import Concat, Stack
from shardmerge.ops.rearranging import Permute, Reshape, Squeeze, Transpose, Unsqueeze
from shardmerge.ops.registry import OPS
from shardmerge.plan.memory import LARGEST_TILE, making_peak, tile_elements
from shardmerge.plan.shard import is_copy
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Extent, Piece, Strided, TensorEntry, dense
from shardmerge.tensors.pieces import single_extent

F32, BF16 = DTYPES["F32"], DTYPES["BF16"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """Parameters of an op and the shapes of its inputs, and their types where the op takes no others."""

    params: dict[str, ParamValue]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ()


CODES = ("F8_E4M3", "F32")


# A case of every kind, of any size: n is even and at least 2.
CASES: dict[str, Callable[[int], list[Case]]] = {
    "transpose": lambda n: [Case({}, ((2 * n, 3 * n),)), Case({"dim0": 0, "dim1": 2}, ((n, 3, n),))],
    "permute": lambda n: [Case({"dims": (3, 2, 0, 1)}, ((n, 3, 2, n),)), Case({"dims": (1, 0, 2)}, ((n, n, 3),))],
    "reshape": lambda n: [Case({"shape": (n, -1), "was": (3 * n, n)}, ((3 * n, n),))],
    "squeeze": lambda n: [Case({"dim": 1}, ((n, 1, n),))],
    "unsqueeze": lambda n: [Case({"dim": -1}, ((n, n),))],
    "slice": lambda n: [Case({"dim": 1, "start": 1, "stop": n}, ((n, 2 * n),)), Case({"start": n}, ((3 * n, n),))],
    "split": lambda n: [Case({"dim": 1, "sizes": (n, 1, 2 * n), "take": 2}, ((n, 3 * n + 1),))],
    "chunk": lambda n: [
        Case({"dim": 1, "chunks": 3, "take": 1}, ((n, 3 * n),)),
        Case({"chunks": 2, "take": 1}, ((n, n),)),
    ],
    "unstack": lambda n: [
        Case({"count": n, "take": 1}, ((n, 2 * n, 3),)),
        Case({"dim": 1, "count": 3, "take": 2}, ((n, 3, 2 * n),)),
    ],
    "concat": lambda n: [
        Case({"dim": 1, "sizes": (n, 1, 2 * n)}, ((n, n), (n, 1), (n, 2 * n))),
        Case({"dim": 0, "sizes": (n, 2)}, ((n, n), (2, n))),
    ],
    "stack": lambda n: [Case({"dim": 1}, ((n, n), (n, n), (n, n))), Case({}, ((n, n), (n, n)))],
    "grouped_split": lambda n: [Case({"groups": n, "sizes": (2, 1, 1), "take": 0}, ((4 * n, n),))],
    "grouped_merge": lambda n: [Case({"groups": n, "sizes": (2, 1, 1)}, ((2 * n, n), (n, n), (n, n)))],
    "rotary_permute": lambda n: [Case({"heads": 2}, ((2 * n, n),)), Case({"heads": n}, ((4 * n, n),))],
    "rotary_unpermute": lambda n: [Case({"heads": 2}, ((2 * n, n),)), Case({"heads": 2}, ((2 * n,),))],
    "cast": lambda n: [Case({"dtype": "bfloat16"}, ((n, n),))],
    "dequantize": lambda n: [
        Case({"block": (2, 3)}, ((n, 3 * n), (n // 2, n)), CODES),
        Case({"block": (4, 4)}, ((2, n + 1, n), (2, -(-(n + 1) // 4), -(-n // 4))), ("F8_E5M2", "BF16")),
        Case({}, ((n, 3), (n, 1)), ("F8_E4M3", "F16")),
        Case({}, ((3, n, n), (3, 1, n)), CODES),
        Case({}, ((2 * n, n), (1,)), CODES),
    ],
    "linear": lambda n: [Case({"weights": (0.25, 0.5)}, ((n, n), (n, n))), Case({}, ((n, n),) * 3)],
    "add": lambda n: [Case({}, ((n, n), (n, n)))],
    "scale": lambda n: [Case({"factor": 0.3}, ((n, n),))],
    "assert_equal": lambda n: [Case({}, ((n, n),))],
    "add_top_left": lambda n: [Case({}, ((n, n), (n + 2, n + 1))), Case({}, ((n, n), (n + 1, n)))],
    "fill": lambda n: [Case({"shape": (n, n), "dtype": "bfloat16", "value": 0.3}, ())],
    "arange": lambda n: [Case({"shape": (n, n)}, ())],
    "new_rows": lambda n: [
        Case({"rows": n, "new": how, "row": 1, "seed": 5}, ((n, n),)) for how in ("mean", "normal", "copy", "zeros")
    ],
    "lora": lambda n: [Case({"scale": 0.5}, ((2, n), (3 * n, 2), (3 * n, n)))],
    "dora": lambda n: [Case({"scale": 0.5}, ((2, n), (3 * n, 2), (3 * n,), (3 * n, n)))],
    "lora_extract": lambda n: [
        Case({"rank": 2, "take": take}, ((3 * n, 8), (3 * n, 8))) for take in ("A", "B")
    ],
    "task_arithmetic": lambda n: [Case({"weights": (0.5, 0.25)}, ((n, n),) * 3)],
    "ties": lambda n: [
        Case({"density": 0.4, "scale": 1}, ((n, n),) * 3),
        Case({"density": (0.0, 1.0, 0.2), "rescale": "l1", "normalize": False}, ((n, n),) * 4),
    ],
    "dare": lambda n: [
        Case({"density": 0.4, "seed": 1, "sign_consensus": consensus, "rescale": how, "salt": "x"}, ((n, n),) * 3)
        for consensus, how in ((False, "density"), (True, "density"), (False, "l1"))
    ],
    "breadcrumbs": lambda n: [
        Case({"density": 0.4, "gamma": 0.1, "sign_consensus": consensus}, ((n, n),) * 3) for consensus in (False, True)
    ],
    "della": lambda n: [
        Case({"density": (0.4, 0.3), "epsilon": 0.1, "seed": 1, "salt": "x"}, ((2 * n, n),) * 3),
        Case({"density": 0.4, "sign_consensus": False, "rescale": "none"}, ((n, 3, 2),) * 2),
    ],
    "sce": lambda n: [Case({"select_topk": 0.3}, ((n, n),) * 3), Case({}, ((n, n),) * 3)],
    "ram": lambda n: [Case({"r": r, "epsilon": 1.0}, ((n, n),) * 4) for r in (0.0, 0.1)],
    "model_stock": lambda n: [Case({"filter_wise": one}, ((n, 2 * n),) * 3) for one in (False, True)],
    "nearswap": lambda n: [Case({"t": 0.3}, ((n, n),) * 2)],
    "arcee_fusion": lambda n: [Case({}, ((n, 2 * n),) * 2), Case({}, ((n,),) * 2)],
    "nuslerp": lambda n: [
        *(Case({"weights": (0.3, 0.9), "along": along}, ((n, 2 * n),) * 2) for along in ("whole", "rows", "columns")),
        *(Case({"along": along, "base": True}, ((n, n, 3),) * 3) for along in ("whole", "rows", "columns")),
    ],
    "multislerp": lambda n: [Case({"weights": (0.3, 0.9, 1)}, ((n, n),) * 3), Case({"base": True}, ((n, n),) * 3)],
    "karcher": lambda n: [Case({}, ((n, n),) * 3)],
    "slerp": lambda n: [Case({"t": 0.3}, ((n, n),) * 2)],
}  # fmt: skip

KINDS = [(kind, index) for kind, cases in CASES.items() for index in range(len(cases(2)))]
MOVES = [
    (kind, index) for kind, index in KINDS if kind in CASES and list(CASES).index(kind) < list(CASES).index("cast")
]


def build(kind: OpKind, params: dict[str, ParamValue]) -> Op:
    """Makes an op as a mapping does, defaults filled in."""
    defaults = {param.name: param.default for param in kind.params if param.default is not None}
    return kind.build({"salt": "", **defaults, **params})


# ---- tensors in files


@dataclass(slots=True)
class Store:
    """Puts arrays into files of a folder, in one of the ways that checkpoints do."""

    folder: Path
    rng: np.random.Generator

    def put(self, array: Array, dtype: DType, way: str = "whole") -> TensorEntry:
        """``whole``: one extent; ``pieces``: several, out of order; ``strided``: a transposed view."""
        flat = np.ascontiguousarray(array).reshape(-1)
        if way == "strided" and array.ndim >= 2:
            return self._strided(array, dtype)
        if way == "pieces" and flat.size > 1:
            inner = np.unique(self.rng.integers(1, flat.size, size=min(4, flat.size - 1)))
            bounds = [0, *(int(place) for place in inner), flat.size]
            parts = [(low, high - low) for low, high in pairwise(bounds)]
            held = {start: self._extent(flat[start : start + size]) for start, size in reversed(parts)}
            pieces = tuple(Piece(start, size, held[start]) for start, size in parts)
            return TensorEntry("t", dtype, array.shape, pieces)
        return TensorEntry("t", dtype, array.shape, dense(self._extent(flat), flat.size))

    def _strided(self, array: Array, dtype: DType) -> TensorEntry:
        """Saved with its first two axes swapped, and every second element of the last one."""
        swapped = np.ascontiguousarray(array.swapaxes(0, 1))
        wide = np.zeros((*swapped.shape, 2), array.dtype)
        wide[..., 0] = swapped
        view = wide[..., 0].swapaxes(0, 1)
        strides = tuple(step // array.itemsize for step in view.strides)
        span = sum((n - 1) * step for n, step in zip(array.shape, strides, strict=True)) + 1
        extent = self._extent(wide.reshape(-1)[:span])
        return TensorEntry("t", dtype, array.shape, (Piece(0, array.size, Strided(extent, array.shape, strides)),))

    def _extent(self, flat: Array) -> Extent:
        path = self.folder / f"data{next(_NUMBERS)}"
        path.write_bytes(b"head" + flat.tobytes())
        return Extent(str(path), 4, flat.nbytes)


_NUMBERS = count()
WAYS = ("whole", "pieces", "strided")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Files of this test."""
    return Store(tmp_path, np.random.default_rng(0))


def values(shape: Shape, dtype: DType, rng: np.random.Generator) -> Array:
    """Normal numbers."""
    return rng.standard_normal(shape).astype(numpy_dtype(dtype))


def put(case: Case, store: Store, way: str) -> list[TensorEntry]:
    """Returns normal numbers in files, as float32 where the case says no other type."""
    types = [DTYPES[name] for name in case.dtypes] or [F32] * len(case.shapes)
    arrays = ((values(shape, dtype, store.rng), dtype) for shape, dtype in zip(case.shapes, types, strict=True))
    return [store.put(array, dtype, way) for array, dtype in arrays]


def read(entry: TensorEntry, start: int = 0, size: int | None = None, tile: int = LARGEST_TILE) -> Array:
    """Reads a range, or the whole in its shape, into a buffer that is full of something else."""
    size_ = entry.numel - start if size is None else size
    data = bytearray(b"\xa5" * (size_ * entry.dtype.itemsize))
    Assembler(FilePool("pread"), tile).fill(entry, start, memoryview(data))
    found = as_array(memoryview(data), entry.dtype)
    return found.reshape(entry.shape) if size is None and not start else found


def same(left: Array, right: Array) -> bool:
    """Tells whether types, shapes and bits are the same."""
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


# ---- every kind


def test_every_kind_has_a_case() -> None:
    assert set(CASES) == set(OPS)


def test_the_table_tells_moves_from_arithmetic() -> None:
    moves = {kind for kind in OPS if isinstance(build(OPS[kind], CASES[kind](2)[0].params), Move)}
    assert moves == {kind for kind, _ in MOVES}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "index"), KINDS)
def test_infer_says_what_is_made(kind: str, index: int, way: str, store: Store) -> None:
    case = CASES[kind](6)[index]
    op = build(OPS[kind], case.params)
    inputs = put(case, store, way)
    made = compose(op, inputs)
    assert Meta.of(made) == op.infer([Meta.of(one) for one in inputs]) or kind == "cast"
    found = read(made)
    assert (found.dtype, found.shape) == (numpy_dtype(made.dtype), made.shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "index"), KINDS)
def test_any_cut_gives_the_same_bits(kind: str, index: int, way: str, store: Store) -> None:
    case = CASES[kind](34)[index]  # more than the 32 rows that LoRA multiplies at a time
    inputs = put(case, store, way)
    made = compose(build(OPS[kind], case.params), inputs)
    whole = read(made).reshape(-1)
    bounds = [0, *sorted(int(place) for place in store.rng.integers(0, made.numel, size=5)), made.numel]
    parts = [read(made, low, high - low, tile=1 << 12) for low, high in pairwise(bounds)]
    assert same(np.concatenate(parts), whole)


# ---- moves


@pytest.mark.parametrize("dtype", [BF16, DTYPES["F64"], DTYPES["U8"]], ids=str)
@pytest.mark.parametrize(("kind", "index"), MOVES)
@settings(max_examples=15)
@given(data=st.data())
def test_a_compiled_move_is_its_apply(
    kind: str, index: int, dtype: DType, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    store = Store(tmp_path_factory.mktemp("laws"), rng)
    case = CASES[kind](data.draw(st.sampled_from((2, 4, 6))))[index]
    op = build(OPS[kind], case.params)
    assert isinstance(op, Move)
    arrays = [(rng.standard_normal(shape) * 50 + 100).astype(numpy_dtype(dtype)) for shape in case.shapes]
    made = compose(op, [store.put(array, dtype, data.draw(st.sampled_from(WAYS))) for array in arrays])
    expected = op.apply(arrays)
    assert made.shape == expected.shape
    start = data.draw(st.integers(0, made.numel))
    size = data.draw(st.integers(0, made.numel - start))
    assert same(read(made, start, size), np.ascontiguousarray(expected).reshape(-1)[start : start + size])


_ONE: tuple[Callable[[Shape], Move | None], ...] = (
    lambda shape: Transpose(0, -1) if shape else None,
    lambda shape: Permute((*range(1, len(shape)), 0)) if len(shape) > 1 else None,
    lambda shape: Reshape((-1,)),
    lambda shape: Reshape((2, prod(shape) // 2)) if prod(shape) % 2 == 0 else None,
    lambda shape: Unsqueeze(0),
    lambda shape: Squeeze(0) if shape and shape[0] == 1 else None,
    lambda shape: Slice(-1, 1, None) if shape and shape[-1] > 1 else None,
    lambda shape: Slice(0, 0, shape[0] - 1) if shape and shape[0] > 1 else None,
    lambda shape: Chunk(0, 2, 1) if shape and shape[0] % 2 == 0 and shape[0] else None,
    lambda shape: Split(-1, (1, shape[-1] - 1), 1) if shape and shape[-1] > 1 else None,
    lambda shape: GroupedSplit(2, (1, shape[0] // 2 - 1), 1) if shape and shape[0] % 2 == 0 and shape[0] > 2 else None,
    lambda shape: Rotary(1, inverse=False) if shape and shape[0] % 2 == 0 else None,
    lambda shape: Rotary(1, inverse=True) if shape and shape[0] % 2 == 0 else None,
)  # fmt: skip


@settings(max_examples=200)
@given(data=st.data())
def test_moves_of_moves_of_moves(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Views of views, of what was joined, and joined views, up to five deep."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    store = Store(tmp_path_factory.mktemp("laws"), rng)
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    array = rng.integers(0, 1 << 15, shape).astype(np.int32)
    entry = store.put(array, DTYPES["I32"], data.draw(st.sampled_from(WAYS)))
    for _ in range(data.draw(st.integers(1, 5))):
        op, others = data.draw(st.sampled_from(_steps(array, rng)))
        put = [store.put(one, DTYPES["I32"], data.draw(st.sampled_from(WAYS))) for one in others]
        twice = data.draw(st.booleans()) and isinstance(op, Stack)
        entry = compose(op, [entry, *([entry] if twice else put)])
        array = np.array(op.apply([array, *([array] if twice else others)]), order="C")
    start = data.draw(st.integers(0, array.size))
    size = data.draw(st.integers(0, array.size - start))
    assert entry.shape == array.shape
    assert is_copy(entry)
    assert same(read(entry, start, size), array.reshape(-1)[start : start + size])


def _steps(array: Array, rng: np.random.Generator) -> list[tuple[Move, list[Array]]]:
    """What can be done to an array, and the arrays it needs beside it; one of them may be empty."""
    steps: list[tuple[Move, list[Array]]] = [(op, []) for make in _ONE if (op := make(array.shape)) is not None]
    steps.append((Stack(array.ndim), [rng.integers(0, 9, array.shape).astype(np.int32)]))
    if array.ndim:
        for dim in {0, array.ndim - 1}:
            shapes = [(*array.shape[:dim], n, *array.shape[dim + 1 :]) for n in (2, 0)]
            steps.append((Concat(dim), [rng.integers(0, 9, shape).astype(np.int32) for shape in shapes]))
        other = rng.integers(0, 9, array.shape).astype(np.int32)
        groups = 2 if array.shape[0] % 2 == 0 else 1
        steps.append((GroupedMerge(groups, (array.shape[0] // groups,) * 2), [other]))
    return steps


def hf_permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """``permute`` of transformers' convert_llama_weights_to_hf.py."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def test_moves_are_those_of_torch() -> None:
    one = torch.arange(8 * 6 * 4).reshape(8, 6, 4)
    two = torch.arange(8 * 6).reshape(8, 6)
    cases: list[tuple[Move, list[torch.Tensor], torch.Tensor]] = [
        (Permute((2, 0, 1)), [one], torch.permute(one, (2, 0, 1))),
        (Permute((-1, 0, -2)), [one], torch.permute(one, (-1, 0, -2))),
        (Permute(), [two], two.T),
        (Transpose(), [one], torch.transpose(one, -2, -1)),
        (Transpose(0, 2), [one], torch.transpose(one, 0, 2)),
        (Reshape((2, -1)), [one], torch.reshape(one, (2, -1))),
        (Squeeze(1), [two[:, None]], torch.squeeze(two[:, None], 1)),
        (Unsqueeze(-1), [two], torch.unsqueeze(two, -1)),
        (Unsqueeze(0), [two], torch.unsqueeze(two, 0)),
        (Slice(1, 2, 5), [one], torch.narrow(one, 1, 2, 3)),
        (Slice(-1, -2, None), [one], one[..., -2:]),
        (Split(1, (1, 2, 3), 2), [one], torch.split(one, [1, 2, 3], 1)[2]),
        (Chunk(-1, 2, 1), [one], torch.chunk(one, 2, -1)[1]),
        (Concat(1), [two, two[:, :2]], torch.cat([two, two[:, :2]], 1)),
        (Concat(-2), [one, one], torch.cat([one, one], -2)),
        (Stack(-1), [two, two + 1], torch.stack([two, two + 1], -1)),
        (Stack(1), [one, one + 1], torch.stack([one, one + 1], 1)),
        (Rotary(2, inverse=False), [two], hf_permute(two, 2)),
        (Rotary(4, inverse=True), [hf_permute(two, 4)], two),
    ]
    for op, inputs, expected in cases:
        assert np.array_equal(op.apply([each.numpy() for each in inputs]), expected.numpy()), op.label


# ---- inverses

INVERTIBLE = [(kind, index) for kind, index in KINDS if OPS[kind].inverse is not None]


@pytest.mark.parametrize(("kind", "index"), INVERTIBLE)
def test_an_op_and_its_inverse_are_the_identity(kind: str, index: int, store: Store) -> None:
    case = CASES[kind](6)[index]
    arrays = [values(shape, BF16, store.rng) for shape in case.shapes]
    inputs = [store.put(array, BF16, way) for array, way in zip(arrays, WAYS, strict=False)]
    for found, array in zip(_undone(OPS[kind], case, inputs), arrays, strict=True):
        assert same(read(found), array)


def _undone(kind: OpKind, case: Case, inputs: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Applies an op and what ``inverse`` says undoes it."""
    match kind.inverse:
        case Mirror(name, params):
            texts = {key: _text(value) for key, value in case.params.items()}
            back = {key: _value(text) for key, text in params(texts).items()}
            return [compose(build(OPS[name], back), [compose(build(kind, case.params), inputs)])]
        case Gathered(name):
            sizes = case.params.get("sizes")
            parts = len(sizes) if isinstance(sizes, tuple) else case.params.get("chunks", case.params.get("count"))
            assert isinstance(parts, int)
            every = [compose(build(kind, {**case.params, "take": take}), inputs) for take in range(parts)]
            back = {key: value for key, value in case.params.items() if key not in ("take", "chunks", "count")}
            return [compose(build(OPS[name], back), every)]
        case Scattered(name, _):
            joined = compose(build(kind, case.params), inputs)
            return [compose(build(OPS[name], {**case.params, "take": k}), [joined]) for k in range(len(inputs))]
        case None:
            raise AssertionError(kind.name)


def _text(value: ParamValue) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _value(text: str) -> ParamValue:
    return tuple(int(word) for word in text[1:-1].split(",")) if text.startswith("[") else int(text)


# ---- memory


@pytest.mark.parametrize(("tile", "way"), [(64 << 10, "strided"), (LARGEST_TILE, "whole"), (LARGEST_TILE, "strided")])
@pytest.mark.parametrize(("kind", "index"), KINDS)
def test_no_more_memory_than_planned(kind: str, index: int, tile: int, way: str, store: Store) -> None:
    case = CASES[kind](600)[index]
    if prod(case.shapes[0] if case.shapes else (1,)) > 3 << 20:
        case = CASES[kind](300)[index]
    inputs = put(case, store, way)
    made = compose(build(OPS[kind], case.params), inputs)
    step = tile_elements(made, tile)
    assembler = Assembler(FilePool("pread"), tile)
    _peak(assembler, made, 0, 1)  # what is imported and cached once
    starts = [0, made.numel // 2 // step * step, (made.numel - 1) // step * step]
    peak = max(_peak(assembler, made, start, min(step, made.numel - start)) for start in starts)
    assert peak <= making_peak(made, tile) + (32 << 10)


def _peak(assembler: Assembler, entry: TensorEntry, start: int, size: int) -> int:
    """Returns the most bytes that were allocated to make a tile, the tile's own included."""
    tracemalloc.start()
    try:
        assembler.release(assembler.view(entry, start, size))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- types, and copies that stay copies


def test_floats_are_widened_exactly_where_they_differ(store: Store) -> None:
    narrow, wide = values((4, 6), BF16, store.rng), values((2, 6), F32, store.rng)
    made = compose(Concat(0), [store.put(narrow, BF16), store.put(wide, F32)])
    assert made.dtype == F32
    assert same(read(made), np.concatenate([narrow.astype(np.float32), wide]))
    half = values((4, 6), DTYPES["F16"], store.rng)
    both = compose(Concat(1), [store.put(narrow, BF16), store.put(half, DTYPES["F16"])])
    assert both.dtype == F32
    assert same(read(both), np.concatenate([narrow.astype(np.float32), half.astype(np.float32)], 1))


def test_what_lies_in_one_extent_stays_there(store: Store) -> None:
    entry = store.put(values((8, 6), BF16, store.rng), BF16)
    (piece,) = entry.pieces
    assert isinstance(piece.held, Extent)
    rows = compose(Slice(0, 2, 6), [entry])
    assert single_extent(rows, 0, rows.numel) == piece.held.slice(2 * 12, 4 * 12)
    part = compose(Chunk(0, 2, 1), [compose(Reshape((2, 12)), [rows])])
    assert single_extent(part, 0, part.numel) == piece.held.slice(4 * 12, 2 * 12)
    joined = compose(Concat(0), [rows, entry])
    assert single_extent(joined, 24, 48) == piece.held
    assert single_extent(joined, 23, 2) is None
    turned = compose(Transpose(), [entry])
    assert single_extent(turned, 0, 48) is None
    assert all(is_copy(one) for one in (rows, part, joined, turned))


# ---- what is read, counted and not timed


def cost(entry: TensorEntry, tile: int = LARGEST_TILE) -> tuple[float, int]:
    """Returns the bytes read by a byte of the result, and the reads, tile by tile as the engine does."""
    pool = FilePool("pread")
    assembler = Assembler(pool, tile)
    step = tile_elements(entry, tile)
    for start in range(0, entry.numel, step):
        assembler.release(assembler.view(entry, start, min(step, entry.numel - start)))
    return pool.bytes_read / entry.nbytes, pool.reads


def hole(folder: Path, shape: Shape, dtype: DType = BF16) -> TensorEntry:
    """A tensor of zeros that takes no room on the disk."""
    path = folder / f"hole{next(_NUMBERS)}"
    nbytes = prod(shape) * dtype.itemsize
    with path.open("wb") as file:
        file.truncate(nbytes)
    return TensorEntry("t", dtype, shape, dense(Extent(str(path), 0, nbytes), prod(shape)))


def test_ranks_side_by_side_are_read_in_blocks_and_once(tmp_path: Path) -> None:
    ranks = [hole(tmp_path, (4096, 512)) for _ in range(8)]
    amount, reads = cost(compose(Concat(1), ranks))
    assert amount <= 1.01
    assert reads <= 8 * 40


@pytest.mark.parametrize(("rows", "width", "dtype"), [(4096, 4096, BF16), (1024, 8192, F32), (4096, 1280, F32)])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_rotary_permutation_reads_about_once(
    rows: int, width: int, dtype: DType, inverse: bool, tmp_path: Path
) -> None:
    amount, reads = cost(compose(Rotary(rows // 128, inverse=inverse), [hole(tmp_path, (rows, width), dtype)]))
    assert amount <= 1.3
    assert reads <= rows


def test_a_transposition_reads_a_matrix_once_a_tile(tmp_path: Path) -> None:
    """A tile of the result needs some columns of all rows; runs shorter than a page are read with what is between."""
    entry = hole(tmp_path, (4096, 4096))
    amount, reads = cost(compose(Transpose(), [entry]))
    assert amount <= 1.01 * entry.nbytes / LARGEST_TILE
    assert reads <= 40 * entry.nbytes // LARGEST_TILE


def test_a_rank_of_a_row_parallel_layer_is_read_alone(tmp_path: Path) -> None:
    amount, _ = cost(compose(Chunk(1, 4, 2), [hole(tmp_path, (512, 16384))]))
    assert amount <= 1.01


def test_groups_are_read_once(tmp_path: Path) -> None:
    fused = hole(tmp_path, (6144, 4096))
    for take, size in enumerate((512, 128, 128)):
        amount, _ = cost(compose(GroupedSplit(8, (512, 128, 128), take), [fused]))
        assert amount <= 1.5, size


def test_what_is_computed_is_not_computed_run_by_run(tmp_path: Path) -> None:
    """LoRA makes blocks of 128 rows: rows asked for one by one would multiply each block 128 times."""
    base, a, b = hole(tmp_path, (512, 4096), F32), hole(tmp_path, (4, 4096), F32), hole(tmp_path, (512, 4), F32)
    merged = compose(build(OPS["lora"], {"scale": 2}), [a, b, base])
    amount, _ = cost(compose(Rotary(2, inverse=False), [merged]))
    assert amount <= 5
