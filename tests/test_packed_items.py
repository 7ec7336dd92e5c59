"""Distributed checkpoints whose items are compressed with zstd, as torch's own extension does it."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

import shardmerge as sm
from benchmarks.harness import answer
from shardmerge import api
from shardmerge.dtypes import DTYPES
from shardmerge.packed_names import PackedName, packed_name
from shardmerge.plan.memory import OPEN_FRAMES as PLANNED_FRAMES
from shardmerge.plan.torch_layout import lay_out_item
from shardmerge.storage.packed import OPEN_FRAMES
from tests.conftest import GOLDEN
from tests.counting import refusal
from tests.scene import tree
from tests.test_dcp_output import assert_same, one_process
from tests.test_memory import convert

zstandard = pytest.importorskip("zstandard", reason="`pip install zstandard`: nothing else unpacks, or packs, these")
from torch.distributed.checkpoint._extension import ZStandard  # noqa: E402

OPTIONS = sm.Options(sync=False)
MIB = 1 << 20


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """By torch itself, with its extension."""
    with one_process():
        dcp.save({"model": tensors}, storage_writer=FileSystemWriter(folder, _extensions=[ZStandard()]))
    return folder


def packed(source: Path, folder: Path, pack: Callable[[bytes], bytes]) -> Path:
    """A copy of a checkpoint of several ranks, its items packed as torch would have packed them."""
    table: Metadata = pickle.loads((source / ".metadata").read_bytes())
    folder.mkdir()
    ends: dict[str, int] = {}
    for place in table.storage_data.values():
        raw = (source / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        data, at = pack(raw), ends.get(place.relative_path, 0)
        with (folder / place.relative_path).open("ab") as file:
            file.write(data)
        place.offset, place.length, place.transform_descriptors = at, len(data), ["stream.zstd/1"]
        ends[place.relative_path] = at + len(data)
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    return folder


def as_torch_does(raw: bytes, **how: int) -> bytes:
    """Streamed, so that the frame does not say how much is in it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, **how)
    return b"".join(pieces(zstandard.ZstdCompressor(compression_params=parameters), raw))


def pieces(compressor: object, raw: bytes) -> list[bytes]:
    work = compressor.compressobj()
    return [work.compress(raw), work.flush()]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "wide": torch.randn(300, 100),
        "half": torch.randn(1000).bfloat16(),
        "ids": torch.arange(9),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }


# ---- what is read


def test_torch_s_own_extension(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = saved(tmp_path / "source", weights)
    sm.convert(source, tmp_path / "out", options=OPTIONS)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), weights)
    found = {name: tensor.torch() for name, tensor in sm.open_checkpoint(source).items()}
    assert_same(found, weights)
    sm.verify(tmp_path / "out")


@pytest.mark.parametrize("case", ["placements_2x2_fp32", "fsdp2_columns_w2_fp32", "views_w1", "fsdp2_w2_bf16"])
def test_parts_of_every_shape_are_those_of_the_items_as_they_were(case: str, tmp_path: Path) -> None:
    """Rows, columns, boxes, transposed views; narrow boxes of several frames are read side by side."""
    source = GOLDEN / "dcp" / case / "ckpt"
    sm.convert(source, tmp_path / "plain", options=OPTIONS)
    sm.convert(packed(source, tmp_path / "ck", as_torch_does), tmp_path / "out", options=OPTIONS)
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain")))


def test_the_same_bytes_for_any_workers_memory_and_io(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, found = saved(tmp_path / "source", weights), []
    ways = [{}, {"workers": 1}, {"workers": 4}, {"io": "mmap"}, {"memory": 72 * MIB, "workers": 1}, {"shard_size": 999}]
    for number, way in enumerate(ways):
        sm.convert(source, tmp_path / str(number), options=sm.Options(sync=False, dtype="float16", **way))
        found.append(tree(tmp_path / str(number)) if "shard_size" not in way else found[0])
    assert all(one == found[0] for one in found)


def test_the_plan_says_that_it_is_a_frame(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = saved(tmp_path / "source", weights)
    prepared = api.prepare_conversion(source, options=OPTIONS)
    api.write_plan(prepared, tmp_path / "plan.json", tmp_path / "out")
    read = api.prepare(tmp_path / "plan.json", OPTIONS)
    assert (read.plan, read.plan.id) == (prepared.plan, prepared.plan.id)
    frames = [name for stamp in read.plan.files() if (name := packed_name(stamp.path))]
    assert len(frames) == len([tensor for tensor in weights.values() if tensor.numel()])
    assert {(name.file, name.window) for name in frames} == {(str(source / "__0_0.distcp"), 2 * MIB)}
    assert all(str(name) in (tmp_path / "plan.json").read_text() for name in frames)
    api.carry_out(read, tmp_path / "out", OPTIONS)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), weights)
    two = {"a": torch.ones(50), "b": torch.zeros(50)}
    ids = set()
    for number, tensors in enumerate([two, {"a": two["b"], "b": two["a"]}]):
        one = saved(tmp_path / f"two {number}", tensors)
        ids.add(api.prepare_conversion(one, options=OPTIONS).plan.id)
    assert len(ids) == 2


def test_names_of_frames() -> None:
    name = PackedName("/a b/c::d.distcp", 704, 1200, 2097152)
    assert packed_name(str(name)) == name
    assert packed_name("/a/__0_0.distcp") is None
    assert packed_name("/a/x::zstd:1:2") is None


def test_the_memory_law_holds(tmp_path: Path) -> None:
    """In a process of its own: 32 frames of 4 MiB, then cut to columns that are read from all ranks at once."""
    torch.manual_seed(2)
    tensors = {f"w{n}": torch.randn(512, 1024).round(decimals=1) for n in range(32)}
    source = saved(tmp_path / "source", tensors)
    done = convert(source, tmp_path / "out", "--workers", "2", "--no-sync")
    planned = answer(done)["planned_peak"]
    assert done.peak <= planned
    assert planned < 120 * MIB
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in tensors.items())


# ---- what is refused


def larger_window(raw: bytes) -> bytes:
    return as_torch_does(raw, window_log=27)


def of_a_dictionary(raw: bytes) -> bytes:
    words = zstandard.ZstdCompressionDict(b"archive/data.pkl" * 99, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    trained = zstandard.train_dictionary(1024, [bytes([n % 251]) * 99 + words.as_bytes()[:n] for n in range(400)])
    return b"".join(pieces(zstandard.ZstdCompressor(dict_data=trained), raw))


def that_says_less(raw: bytes) -> bytes:
    return bytes(zstandard.ZstdCompressor().compress(raw[:1100]))


def no_frame(raw: bytes) -> bytes:
    return b"PK" + as_torch_does(raw)


def of_zeros(raw: bytes) -> bytes:
    """A gigabyte of zeros: no item, and 32 KB in the file."""
    work = zstandard.ZstdCompressor().compressobj()
    return b"".join([work.compress(bytes(MIB)) for _ in range(1024)] + [work.flush()])


AT_ONCE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a window of 128 MiB": (larger_window, "packed-item"),
    "a dictionary": (of_a_dictionary, "packed-item"),
    "less than the tensor": (that_says_less, "packed-item"),
    "no frame": (no_frame, "packed-item"),
    "a bomb": (of_zeros, "item-format"),
}


@pytest.mark.parametrize("what", AT_ONCE)
def test_a_frame_that_lies_is_refused_while_planning(what: str, tmp_path: Path) -> None:
    pack, code = AT_ONCE[what]
    with one_process():
        dcp.save({"model": {"w": torch.randn(99, 99)}}, checkpoint_id=tmp_path / "plain")
    source = packed(tmp_path / "plain", tmp_path / "ck", pack)
    start = time.process_time()
    error = refusal(lambda: sm.convert(source, tmp_path / "out", options=OPTIONS))[0]
    assert time.process_time() - start < 2
    assert error.code == code
    assert not (tmp_path / "out").exists()


def test_a_frame_too_small_for_what_its_head_says_is_refused(tmp_path: Path) -> None:
    """A tensor of 4 TiB, says .metadata, and the head of the item too; a frame of a KB unpacks to 32 MiB at most."""
    shape = (1 << 20, 1 << 20)
    with one_process():
        dcp.save({"model": {"w": torch.ones(2, 2)}}, checkpoint_id=tmp_path / "plain")
    table: Metadata = pickle.loads((tmp_path / "plain" / ".metadata").read_bytes())
    said = table.state_dict_metadata["model.w"]
    said.size, said.chunks[0] = torch.Size(shape), replace(said.chunks[0], sizes=torch.Size(shape))
    (tmp_path / "plain" / ".metadata").write_bytes(pickle.dumps(table))
    head = lay_out_item(DTYPES["F32"], shape).blobs[0][1]
    source = packed(tmp_path / "plain", tmp_path / "ck", lambda raw: as_torch_does(head + raw))
    error = refusal(lambda: sm.inspect(source))[0]
    assert error.code == "packed-item"
    assert "4,398,046,511,104" in error.found


def with_more(raw: bytes) -> bytes:
    """A true item, and a gigabyte behind it in the same frame."""
    work = zstandard.ZstdCompressor().compressobj()
    return b"".join([work.compress(raw)] + [work.compress(bytes(MIB)) for _ in range(1024)] + [work.flush()])


def cut(raw: bytes) -> bytes:
    return as_torch_does(raw[: len(raw) // 2])


def flipped(raw: bytes) -> bytes:
    """Still a sound frame, of other values."""
    changed = bytearray(raw)
    changed[len(raw) // 2] ^= 1
    return as_torch_does(bytes(changed))


def damaged(raw: bytes) -> bytes:
    changed = bytearray(as_torch_does(raw))
    changed[len(changed) // 2 : len(changed) // 2 + 40] = bytes(40)
    return bytes(changed)


IN_THE_RUN: dict[str, tuple[Callable[[bytes], bytes], set[str]]] = {
    "more than the item": (with_more, {"packed-item"}),
    "half of the item": (cut, {"truncated-file"}),
    "another bit": (flipped, {"damaged-record"}),
    "bytes that are damaged": (damaged, {"damaged-record"}),
}


@pytest.mark.parametrize("what", IN_THE_RUN)
def test_what_only_unpacking_shows_stops_the_run(what: str, tmp_path: Path) -> None:
    """All of a frame is unpacked once more than needed, for the checksum at its end."""
    pack, codes = IN_THE_RUN[what]
    torch.manual_seed(4)
    with one_process():
        dcp.save({"model": {"w": torch.randn(99, 99)}}, checkpoint_id=tmp_path / "plain")
    source = packed(tmp_path / "plain", tmp_path / "ck", pack)
    start = time.process_time()
    error = refusal(lambda: sm.convert(source, tmp_path / "out", options=OPTIONS))[0]
    assert time.process_time() - start < 2
    assert error.code in codes
    assert "__0_0.distcp" in error.where
    assert not (tmp_path / "out").exists()


def test_without_the_library_it_says_what_to_install(
    weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "source", weights)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    error = refusal(lambda: sm.inspect(source))[0]
    assert error.code == "packed-item"
    assert error.hint.startswith("pip install 'shardmerge[zstd]'")


def test_a_source_that_changes_is_noticed(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = saved(tmp_path / "source", weights)
    prepared = api.prepare_conversion(source, options=OPTIONS)
    file = source / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data)
    error = refusal(lambda: api.carry_out(prepared, tmp_path / "out", OPTIONS))[0]
    assert error.code == "source-changed"


def test_the_plan_counts_the_frames_that_are_open() -> None:
    assert OPEN_FRAMES == PLANNED_FRAMES
