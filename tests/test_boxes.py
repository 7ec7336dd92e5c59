"""Tensors in boxes: read as numpy slices them and as torch's distributed checkpoint saves them; what is no tiling."""

from __future__ import annotations

import io
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import shardmerge as sm
from shardmerge.compose import compose
from shardmerge.dtypes import DTYPES
from shardmerge.errors import CheckpointError
from shardmerge.execute.engine import Workshop
from shardmerge.execute.gather import Assembler
from shardmerge.execute.means import Means
from shardmerge.execute.pins import Pins
from shardmerge.execute.tiling import Tiling
from shardmerge.lazy import lazy_catalog
from shardmerge.plan.explain_tensor import tensor_story_json, tensor_story_text
from shardmerge.plan.memory import KEPT_TILINGS, WORKSPACE, tiling_bytes
from shardmerge.plan.order import first_byte
from shardmerge.plan.value import Part, Plan
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Box, Boxes, Catalog, Extent, Piece, Strided, TensorEntry
from shardmerge.tensors.boxes import boxed, check_tiling
from shardmerge.tensors.pieces import is_plain
from shardmerge.tensors.strides import blocks, row_major
from tests import write_dcp
from tests.conftest import read_entry
from tests.counting import calls, refusal
from tests.made import built

F32 = DTYPES["F32"]

Shape = tuple[int, ...]
Place = tuple[Shape, Shape]


@dataclass
class Store:
    """Puts boxes of an array in files of its own, dense or with their axes in another order."""

    folder: Path
    count: int = 0

    def box(self, values: np.ndarray, place: Place, order: tuple[int, ...] = ()) -> Box:
        offsets, shape = place
        part = values[tuple(slice(at, at + n) for at, n in zip(offsets, shape, strict=True))]
        self.count += 1
        path = self.folder / f"box{self.count}"
        data = np.ascontiguousarray(part.transpose(order) if order else part).tobytes()
        path.write_bytes(bytes(self.count % 7) + data)  # at any byte, as in a .distcp
        extent = Extent(str(path), self.count % 7, len(data))
        if not order or not data:
            return Box(offsets, shape, extent)
        steps = row_major(tuple(shape[axis] for axis in order))
        return Box(
            offsets, shape, Strided(extent, shape, tuple(steps[order.index(axis)] for axis in range(len(shape))))
        )

    def entry(self, values: np.ndarray, places: list[Place]) -> TensorEntry:
        pieces = boxed(F32, values.shape, [self.box(values, place) for place in places])
        return TensorEntry("t", F32, values.shape, pieces, "boxes", "source")


class Counting(Assembler):
    """Notes the buffers that it is asked for."""

    def __init__(self, pool: FilePool) -> None:
        super().__init__(pool)
        self.taken: list[int] = []

    def take(self, nbytes: int) -> memoryview:
        self.taken.append(nbytes)
        return super().take(nbytes)


def grid(shape: Shape, cuts: list[list[int]]) -> list[Place]:
    """The boxes between cuts, an axis each."""
    intervals = [list(pairwise([0, *sorted(at), n])) for at, n in zip(cuts, shape, strict=True)]
    return [
        (tuple(low for low, _ in chosen), tuple(high - low for low, high in chosen)) for chosen in product(*intervals)
    ]


@st.composite
def irregular(draw: st.DrawFn, offsets: Shape, shape: Shape, depth: int) -> list[Place]:
    """A box, or two that it is cut into, cut on."""
    axes = [axis for axis, n in enumerate(shape) if n > 1]
    if not depth or not axes or not draw(st.integers(0, 3)):
        return [(offsets, shape)]
    axis = draw(st.sampled_from(axes))
    at = draw(st.integers(1, shape[axis] - 1))
    first = (*shape[:axis], at, *shape[axis + 1 :])
    second = (*shape[:axis], shape[axis] - at, *shape[axis + 1 :])
    behind = (*offsets[:axis], offsets[axis] + at, *offsets[axis + 1 :])
    return [*draw(irregular(offsets, first, depth - 1)), *draw(irregular(behind, second, depth - 1))]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Shape, list[Place]]:
    """A shape of 0 to 4 axes, and boxes that tile it, in any order: a grid, or cut anyhow."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    if draw(st.booleans()):
        places = grid(shape, [draw(st.lists(st.integers(1, n - 1), unique=True)) if n > 1 else [] for n in shape])
    else:
        places = draw(irregular((0,) * len(shape), shape, 4))
    return shape, draw(st.permutations(places))


# ---- reading


@given(tiling=tilings(), data=st.data())
def test_any_range_is_what_numpy_slices(tiling, data, tmp_path_factory) -> None:
    shape, places = tiling
    store = Store(tmp_path_factory.mktemp("boxes"))
    values = np.arange(prod(shape), dtype=np.float32).reshape(shape)
    orders = [data.draw(st.just(()) | st.permutations(range(len(shape))).map(tuple)) for _ in places]
    boxes = [store.box(values, place, order) for place, order in zip(places, orders, strict=True)]
    entry = TensorEntry("t", F32, shape, boxed(F32, shape, boxes))
    start = data.draw(st.integers(0, prod(shape) - 1))
    count = data.draw(st.integers(0, prod(shape) - start))
    assembler, out = Assembler(FilePool()), bytearray(4 * count)
    assembler.fill(entry, start, memoryview(out))
    assert np.array_equal(np.frombuffer(out, np.float32), values.reshape(-1)[start : start + count])
    assert np.array_equal(read_entry(entry), values)
    if not any(orders):
        assert assembler.pool.bytes_read == 4 * count  # every byte once, and none beside


@given(shape=st.lists(st.integers(1, 5), max_size=4).map(tuple), data=st.data())
def test_a_range_is_as_few_blocks_as_there_can_be(shape: Shape, data) -> None:
    numel = prod(shape)
    start = data.draw(st.integers(0, numel - 1))
    count = data.draw(st.integers(0, numel - start))
    numbers = np.arange(numel).reshape(shape)
    found: list[int] = []
    made = list(blocks(shape, start, count))
    for index, sizes in made:
        found += numbers[tuple(slice(at, at + n) for at, n in zip(index, sizes, strict=True))].reshape(-1).tolist()
    assert found == list(range(start, start + count))
    assert len(made) <= max(2 * len(shape) - 1, 1)


def test_rows_of_boxes_that_are_whole_are_read_into_their_place(tmp_path: Path) -> None:
    """Of three boxes below each other and two beside: what spans the tensor takes no copy, and one read."""
    values = np.arange(60, dtype=np.float32).reshape(10, 6)
    entry = Store(tmp_path).entry(values, [((0, 0), (4, 6)), ((4, 0), (2, 3)), ((4, 3), (2, 3)), ((6, 0), (4, 6))])
    assembler, out = Counting(FilePool()), bytearray(values.nbytes)
    assembler.fill(entry, 0, memoryview(out))
    assert out == values.tobytes()
    assert assembler.pool.reads == 4
    assert assembler.taken == [2 * 3 * 4] * 2


def test_what_is_read_to_be_copied_is_read_in_blocks(tmp_path: Path) -> None:
    """A whole tensor at once, as ``LazyTensor.numpy`` does: no buffer is larger than the planner counts."""
    values = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    entry = Store(tmp_path).entry(values, grid((1024, 1024), [[], [100]]))
    assembler, out = Counting(FilePool()), bytearray(values.nbytes)
    assembler.fill(entry, 0, memoryview(out))
    assert out == values.tobytes()
    assert max(assembler.taken) <= WORKSPACE
    assert assembler.pool.reads == 1 + 4


def many(boxes: int, axes: int) -> Boxes:
    shape = (*(2,) * (axes - 1), boxes)
    return Boxes(shape, tuple(Box((*(0,) * (axes - 1), n), (*shape[:-1], 1), Extent("f", 0, 4)) for n in range(boxes)))


@pytest.mark.parametrize("axes", [1, 2, 4])
@pytest.mark.parametrize("boxes", [300, 4000])
def test_finding_boxes_takes_what_is_planned(boxes: int, axes: int) -> None:
    """As many tensors as are remembered, and a block that meets every box of one."""
    held = [many(boxes, axes) for _ in range(KEPT_TILINGS)]
    tracemalloc.start()
    kept = [Tiling(one) for one in held]
    assert sum(1 for _ in kept[0].meet((0,) * axes, held[0].shape)) == boxes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= tiling_bytes(held[0]) + 4096 < 2 * peak


def test_a_few_tensors_in_boxes_are_remembered(tmp_path: Path) -> None:
    """Their places, of a tensor that is made of more; the planner counts so many."""
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    store = Store(tmp_path)
    parts = [store.entry(values + n, grid((4, 6), [[], [2, 5]])) for n in range(KEPT_TILINGS + 3)]
    joined = compose(built("concat", dim=0), parts)
    assembler, out = Assembler(FilePool()), bytearray(joined.nbytes)
    kept = assembler._arranging()._tilings
    for _ in range(2):
        for start in range(0, joined.numel, 24):
            assembler.fill(joined, start, memoryview(out)[4 * start : 4 * (start + 24)])
            assert 0 < len(kept) <= KEPT_TILINGS
    assert out == np.concatenate([values + n for n in range(len(parts))]).tobytes()


def test_what_is_rearranged_is_not_plain(tmp_path: Path) -> None:
    """Short ranges of dense boxes cost their bytes; of a box whose axes lie in another order, all that lies between."""
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    store, places = Store(tmp_path), grid((4, 6), [[], [2, 5]])
    for orders, plain in (((), (), ()), True), (((), (1, 0), ()), False):
        boxes = [store.box(values, place, order) for place, order in zip(places, orders, strict=True)]
        assert is_plain(TensorEntry("t", F32, (4, 6), boxed(F32, (4, 6), boxes))) is plain


# ---- pieces


@given(tiling=tilings(), seed=st.integers(0, 9))
def test_boxes_in_any_order_are_one_value(tiling, seed: int) -> None:
    shape, places = tiling
    boxes = [Box(*place, Extent(f"box{n}", 0, 4 * prod(place[1]))) for n, place in enumerate(places)]
    pieces = boxed(F32, shape, boxes)
    random.Random(seed).shuffle(boxes)
    again = boxed(F32, shape, boxes)
    assert again == pieces
    assert hash(again) == hash(pieces)
    sent = pickle.loads(pickle.dumps(pieces))
    assert sent == pieces
    for piece in sent:
        if isinstance(piece.held, Boxes):
            assert (piece.held.row, piece.held.run) == (pieces[0].held.row, pieces[0].held.run)


@given(tiling=tilings())
def test_boxes_are_flat_pieces_where_numpy_says_that_they_lie_in_a_row(tiling) -> None:
    shape, places = tiling
    numbers = np.arange(prod(shape)).reshape(shape)
    runs = [numbers[tuple(slice(at, at + n) for at, n in zip(*place, strict=True))].reshape(-1) for place in places]
    boxes = [Box(*place, Extent(f"box{n}", 0, 4 * prod(place[1]))) for n, place in enumerate(places)]
    pieces = boxed(F32, shape, boxes)
    if all(np.array_equal(run, np.arange(run[0], run[0] + len(run))) for run in runs):
        expected = sorted((int(run[0]), len(run), box.held) for run, box in zip(runs, boxes, strict=True))
        assert [(piece.start, piece.count, piece.held) for piece in pieces] == expected
    else:
        (piece,) = pieces
        assert isinstance(piece.held, Boxes)
        assert sorted(piece.held.boxes, key=lambda box: box.held.file) == sorted(boxes, key=lambda box: box.held.file)
        assert [box.offsets for box in piece.held.boxes] == sorted(box.offsets for box in boxes)


def test_boxes_without_elements_are_left_out_wherever_they_lie() -> None:
    """FSDP2 writes them for ranks that have no row: behind the end, and in other axes anywhere."""
    full = Box((0, 0), (1, 11), Extent("a", 0, 44))
    empty = [Box((1, 0), (0, 11), Extent("b", 0, 0)), Box((7, 13), (0, 11), Extent("c", 0, 0))]
    assert boxed(F32, (1, 11), [empty[0], full, empty[1]]) == (Piece(0, 11, full.held),)
    assert boxed(F32, (0, 11), empty) == ()


def test_boxes_are_flat_pieces_only_if_all_of_them_are_dense(tmp_path: Path) -> None:
    """The first piece stands for all in the memory law, and a view takes more than a dense extent."""
    values, store = np.arange(24, dtype=np.float32).reshape(4, 6), Store(tmp_path)
    upper, lower = grid((4, 6), [[1], []])
    (piece,) = boxed(F32, (4, 6), [store.box(values, upper), store.box(values, lower, (1, 0))])
    assert isinstance(piece.held, Boxes)
    whole = store.box(values, ((0, 0), (4, 6)), (1, 0))
    assert boxed(F32, (4, 6), [whole]) == (Piece(0, 24, whole.held),)


def test_a_box_is_held_by_as_many_bytes_as_it_has() -> None:
    for held in (
        Extent("a", 0, 40),
        Strided(Extent("a", 0, 44), (11, 1), (1, 1)),
        Strided(Extent("a", 0, 40), (1, 11), (1, 1)),
    ):
        with pytest.raises(ValueError, match="held by"):
            boxed(F32, (1, 11), [Box((0, 0), (1, 11), held)])


# ---- what is no tiling


def unheld(place: Place) -> Box:
    return Box(*place, Extent("file", 0, 4 * prod(place[1])))


def holders(shape: Shape, boxes: list[Box]) -> np.ndarray:
    """How many boxes hold each element."""
    counts = np.zeros(shape, int)
    for box in boxes:
        counts[tuple(slice(at, at + n) for at, n in zip(box.offsets, box.shape, strict=True))] += 1
    return counts


@given(tiling=tilings(), data=st.data())
def test_what_does_not_tile_is_refused_with_the_first_element_that_is_wrong(tiling, data) -> None:
    """The oracle counts every element. Boxes are taken away, doubled, moved and resized, one to three of them."""
    shape, places = tiling
    boxes = [unheld(place) for place in places]
    for _ in range(data.draw(st.integers(0, 3))):
        if not boxes:
            break
        at = data.draw(st.integers(0, len(boxes) - 1))
        kind = data.draw(st.sampled_from(["drop", "double", "other"]))
        if kind == "drop":
            del boxes[at]
        elif kind == "double":
            boxes.append(boxes[at])
        else:
            low = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
            sizes = tuple(data.draw(st.integers(1, n - first)) for n, first in zip(shape, low, strict=True))
            boxes[at] = unheld((low, sizes))
    counts = holders(shape, boxes)
    if (counts == 1).all():
        check_tiling(shape, boxes, "w")
        return
    error, _ = refusal(lambda: boxed(F32, shape, boxes, "w"))
    point = np.argwhere(counts != 1)[0].tolist()
    assert error.code == ("box-overlap" if counts[tuple(point)] else "box-hole")
    assert error.where == "w"
    assert error.expected == f"one box that holds element {point}"


@pytest.mark.parametrize(
    "place",
    [((0, 0), (3, 5)), ((0, 1), (3, 4)), ((-1, 0), (4, 4)), ((0,), (3,)), ((0, 0, 0), (3, 4, 1)), ((0, 0), (4,))],
)
def test_a_box_beyond_its_tensor_is_refused(place: Place) -> None:
    error, _ = refusal(lambda: check_tiling((3, 4), [unheld(place)], "w"))
    assert isinstance(error, CheckpointError)
    assert (error.code, error.expected) == ("box-outside", "a part of [3, 4]")
    assert str(list(place[0])) in error.found


def test_an_overlap_names_the_boxes() -> None:
    boxes = [Box((0, 0), (2, 3), Extent("one", 0, 24)), Box((0, 2), (2, 2), Extent("two", 0, 16))]
    error, _ = refusal(lambda: check_tiling((2, 4), boxes))
    assert error.found == "[2, 3] at [0, 0] in one and [2, 2] at [0, 2] in two"


@pytest.mark.parametrize(("few", "many"), [((1, 1024), (1, 4096)), ((1024, 1), (4096, 1)), ((32, 32), (64, 64))])
def test_checking_takes_as_long_as_there_are_boxes(few: tuple[int, int], many: tuple[int, int]) -> None:
    def cost(cuts: tuple[int, int], order: random.Random | None) -> int:
        places = grid((8192, 8192), [list(range(8192 // n, 8192, 8192 // n)) for n in cuts])
        boxes = [unheld(place) for place in places]
        if order is not None:
            order.shuffle(boxes)
        return calls(lambda: boxed(F32, (8192, 8192), boxes))

    for order in (None, random.Random(0)):
        assert cost(many, order) < 4.5 * cost(few, order)


@pytest.mark.parametrize("axes", [17, 60])
def test_a_liar_with_many_axes_is_refused_at_once(axes: int) -> None:
    """Neither two million corners are summed up, nor 2 ** 66."""
    boxes = [unheld(((0,) * axes, (*(2,) * at, 1, *(2,) * (axes - 1 - at)))) for at in range(axes)]
    error, cost = refusal(lambda: check_tiling((2,) * axes, boxes, "w"))
    assert error.code == "box-cuts"
    assert error.found == f"{axes} boxes, cut along {axes} axes"
    assert cost < 50_000


# ---- torch's distributed checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that torch saved on four ranks."""
    folder = tmp_path_factory.mktemp("dcp")
    subprocess.run([sys.executable, write_dcp.__file__, folder], check=True, timeout=300)
    return folder / "checkpoint"


def chunk(folder: Path, offsets: Shape, sizes: Shape, stored: dcp.filesystem._StorageInfo) -> Box:
    """A box as torch saved it: an item of a .distcp is a zip of torch.save, whose one storage holds the elements."""
    path = folder / stored.relative_path
    item = path.read_bytes()[stored.offset : stored.offset + stored.length]
    tensor = torch.load(io.BytesIO(item), weights_only=True)
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        (data,) = [info for info in archive.infolist() if info.filename.endswith("data/0")]
    name, extra = struct.unpack_from("<HH", item, data.header_offset + 26)
    extent = Extent(str(path), stored.offset + data.header_offset + 30 + name + extra, data.file_size)
    return Box(offsets, sizes, extent if tensor.is_contiguous() else Strided(extent, sizes, tensor.stride()))


def read_dcp(folder: Path) -> dict[str, TensorEntry]:
    """The entries of a checkpoint, from what torch reads of its metadata."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    found = {}
    for name, tensor in metadata.state_dict_metadata.items():
        dtype = next(row for row in DTYPES.values() if f"torch.{row.torch}" == str(tensor.properties.dtype))
        chunks = [
            chunk(folder, tuple(one.offsets), tuple(one.sizes), metadata.storage_data[index])
            for one in tensor.chunks
            if (index := dcp.metadata.MetadataIndex(name, one.offsets)) in metadata.storage_data
        ]
        found[name] = TensorEntry(name, dtype, tuple(tensor.size), boxed(dtype, tuple(tensor.size), chunks, name))
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_chunks_of_torch_are_read_as_torch_reads_them(saved: Path) -> None:
    entries = read_dcp(saved)
    expected = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype.torch)) for name, entry in entries.items()
    }
    dcp.load(expected, checkpoint_id=saved, no_dist=True)
    assert len(entries) == 12
    for name, tensor in expected.items():
        assert read_entry(entries[name]).tobytes() == tensor.view(-1).view(torch.uint8).numpy().tobytes(), name
    held = {name: [type(piece.held) for piece in entry.pieces] for name, entry in entries.items()}
    assert held["rows"] == [Extent] * 4
    assert held["rows.fewer_than_ranks"] == [Extent] * 2
    assert held["scalar"] == held["replicas"] == [Extent]
    boxes = {name for name, kinds in held.items() if kinds == [Boxes]}
    assert boxes == {"columns", "columns.of_four", "both", "three_axes", "inner_axes", "turned"}
    assert entries["turned"].pieces[0].held.view is not None


def test_a_chunk_that_torch_saved_and_somebody_lost_is_a_hole(saved: Path) -> None:
    held = read_dcp(saved)["three_axes"].pieces[0].held
    for lost in held.boxes:
        rest = [box for box in held.boxes if box is not lost]
        error, _ = refusal(lambda rest=rest: boxed(F32, held.shape, rest, "three_axes"))
        assert (error.code, error.where) == ("box-hole", "three_axes")
        assert error.expected == f"one box that holds element {list(lost.offsets)}"


# ---- what walks entries


@pytest.fixture
def columns(tmp_path: Path) -> tuple[TensorEntry, np.ndarray]:
    """A matrix in six boxes beside each other."""
    values = np.arange(40 * 60, dtype=np.float32).reshape(40, 60)
    return Store(tmp_path).entry(values, grid((40, 60), [[], [10, 20, 30, 40, 50]])), values


def test_a_slice_reads_its_elements_alone(columns: tuple[TensorEntry, np.ndarray]) -> None:
    entry, values = columns
    for index in ((slice(3, 30), slice(12, 18)), (slice(None), 7), (5, slice(15, 45)), slice(7, 9), (3, 4)):
        tensor = lazy_catalog(Catalog("", "boxes", {"t": entry}))["t"]
        assert np.array_equal(tensor[index], values[index])
        assert tensor._reader._pool.bytes_read == values[index].nbytes


def with_entry(folder: Path, entry: TensorEntry) -> Plan:
    """A plan that copies a tensor, with another in its place."""
    save_file({"t": np.zeros(entry.shape, np.float32)}, folder / "model.safetensors")
    (folder / "m.yaml").write_text("shardmerge: 1\nsources: {m: model.safetensors}\ntensors: {t: 'm:t'}\n", "utf-8")
    plan = sm.plan(folder / "m.yaml")
    (shard,) = plan.shards
    (tensor,) = shard.tensors
    return replace(plan, shards=(replace(shard, tensors=(replace(tensor, entry=entry),)),))


def test_a_run_writes_the_tensor(columns: tuple[TensorEntry, np.ndarray], tmp_path: Path) -> None:
    entry, values = columns
    part = Part("", 0, with_entry(tmp_path, entry).shards[0], ())
    outcome = Workshop(Means(sync=False), Pins(part.files)).make(part, tmp_path / "made.safetensors", [0])
    assert np.array_equal(load_file(tmp_path / "made.safetensors")["t"], values)
    assert (outcome.bytes_read, outcome.reads) == (values.nbytes, 6)


def test_it_is_made_where_its_first_box_lies(columns: tuple[TensorEntry, np.ndarray]) -> None:
    entry, _ = columns
    (piece,) = entry.pieces
    assert first_byte(entry) == (piece.held.boxes[0].held.file, piece.held.boxes[0].held.offset)


def test_its_story_names_boxes_and_the_bytes_that_hold_them(
    columns: tuple[TensorEntry, np.ndarray], tmp_path: Path
) -> None:
    entry, values = columns
    plan = with_entry(tmp_path, entry)
    story = tensor_story_json(plan, "t")
    made = story["made"]
    assert (made["pieces"], len(made["first_pieces"]), story["copy"]) == (6, 4, True)
    for box in made["first_pieces"]:
        with open(box["file"], "rb") as file:
            file.seek(box["offset"])
            found = np.frombuffer(file.read(box["nbytes"]), np.float32).reshape(box["shape"])
        (row, column), (rows, width) = box["offsets"], box["shape"]
        assert np.array_equal(found, values[row : row + rows, column : column + width])
    text = tensor_story_text(plan, "t")
    assert "a box [40, 10] at [0, 20]" in text
    assert "and 2 more boxes" in text
