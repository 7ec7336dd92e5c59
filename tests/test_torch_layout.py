"""The torch files that are laid out here, against torch: what it reads from them, and the bytes it writes itself."""

from __future__ import annotations

import binascii
import bisect
import collections
import itertools
import math
import random
import shutil
import struct
import subprocess
import zipfile
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shardmerge
from shardmerge.dtypes import DTYPES
from shardmerge.errors import TargetError
from shardmerge.execute.checksum import combine
from shardmerge.plan.torch_layout import lay_out_torch
from tests.counting import calls

torch = pytest.importorskip("torch")

# The types that the installed torch has; uint16 to uint64 came with 2.3, float8_e8m0fnu with 2.7.
KNOWN = [dtype for dtype in DTYPES.values() if hasattr(torch, dtype.torch)]
WIDE = 0xFFFFFFFF

SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)
NAMES = st.text(max_size=300)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(KNOWN), SHAPES), max_size=12)


def of(tensors):
    return [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]


def contents(tensors, seed=0):
    """Returns random bytes for each tensor; zeros and ones for booleans."""
    source = random.Random(seed)
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors]
    data = [source.randbytes(size) for size in sizes]
    return [
        bytes(byte & 1 for byte in raw) if dtype.kind == "bool" else raw
        for (_, dtype, _), raw in zip(tensors, data, strict=True)
    ]


def write(path, layout, data, seed=0):
    """Writes a file as the engine does: at final offsets, in any order."""
    parts = list(layout.blobs) + list(zip(layout.offsets, data, strict=True))
    random.Random(seed).shuffle(parts)
    sums = [
        (field, struct.pack("<I", zlib.crc32(raw)))
        for fields, raw in zip(layout.crc_fields, data, strict=True)
        for field in fields
    ]
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for offset, raw in parts + sums:
            file.seek(offset)
            file.write(raw)
    assert path.stat().st_size == layout.nbytes
    return path


def as_tensors(tensors, data):
    """Returns what the file holds, made by torch."""
    made = collections.OrderedDict()
    for (name, dtype, shape), raw in zip(tensors, data, strict=True):
        kind = getattr(torch, dtype.torch)
        flat = torch.frombuffer(bytearray(raw), dtype=kind) if raw else torch.empty(0, dtype=kind)
        made[name] = flat.reshape(shape)
    return made


def bits(tensor):
    return bytes(tensor.untyped_storage().tolist())


def assert_loads(path, expected, **options):
    found = torch.load(path, weights_only=True, **options)
    assert type(found) is collections.OrderedDict
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].stride() == tensor.stride()
        assert not found[name].requires_grad
        if tensor.numel():  # the storage of an empty tensor of frombuffer may hold bytes
            assert bits(found[name]) == bits(tensor), name


def assert_tiles(layout, data):
    """Blobs and tensors cover the file once, and blobs are in order."""
    parts = sorted([*((at, len(raw)) for at, raw in layout.blobs), *zip(layout.offsets, map(len, data), strict=True)])
    ends = [at + size for at, size in parts if size]
    assert [at for at, size in parts if size] == [0, *ends[:-1]]
    assert ends[-1] == layout.nbytes
    assert [at for at, _ in layout.blobs] == sorted(at for at, _ in layout.blobs)
    assert all(raw for _, raw in layout.blobs)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A path for a property test, which a fixture made per test would not allow."""
    return tmp_path_factory.mktemp("layout") / "model.bin"


# What torch and others read


@settings(max_examples=60, deadline=None)
@given(TENSORS)
@example({})
@example({f"{dtype} {shape}": (dtype, shape) for dtype in KNOWN for shape in [(), (0,), (3, 5), (2, 0, 3), (1, 1)]})
@example({"x" * 70_000: (DTYPES["F32"], (2,)), "\udcff": (DTYPES["BF16"], ()), "": (DTYPES["U8"], (1,))})
def test_torch_reads_it(place, tensors):
    tensors = of(tensors)
    data = contents(tensors)
    layout = lay_out_torch(tensors, "model")
    assert_tiles(layout, data)
    assert all(offset % 64 == 0 for offset in layout.offsets)
    expected = as_tensors(tensors, data)
    path = write(place, layout, data)
    assert_loads(path, expected)
    assert_loads(path, expected, mmap=True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("dtype", KNOWN, ids=str)
def test_each_type_in_a_file_of_its_own(tmp_path, dtype):
    tensors = [("matrix", dtype, (3, 5)), ("scalar", dtype, ()), ("empty", dtype, (4, 0))]
    data = contents(tensors)
    path = write(tmp_path / "model.bin", lay_out_torch(tensors, "model"), data)
    assert_loads(path, as_tensors(tensors, data))
    assert_loads(path, as_tensors(tensors, data), mmap=True)


@pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
def test_unzip_finds_no_fault(tmp_path):
    tensors = [("a", DTYPES["F32"], (100, 3)), ("empty", DTYPES["F32"], (0,)), ("b", DTYPES["I64"], ())]
    path = write(tmp_path / "model.bin", lay_out_torch(tensors, "model"), contents(tensors))
    result = subprocess.run(["unzip", "-t", path], capture_output=True, check=False)
    assert result.returncode == 0, result.stdout


def test_shardmerge_reads_it(tmp_path):
    tensors = [(dtype.name, dtype, (2, 3)) for dtype in DTYPES.values()] + [("scalar", DTYPES["F32"], ())]
    data = contents(tensors)
    layout = lay_out_torch(tensors, "model")
    path = write(tmp_path / "model.bin", layout, data)
    catalog = shardmerge.inspect(path)
    found = [(entry.name, entry.dtype, entry.shape) for entry in catalog.entries.values()]
    assert found == tensors
    assert not catalog.aliases
    offsets = [piece.held.offset for entry in catalog.entries.values() for piece in entry.pieces]
    assert offsets == list(layout.offsets)


def test_the_first_eight_bytes_seal_the_file(tmp_path):
    tensors = [("a", DTYPES["F32"], (3,))]
    path = write(tmp_path / "model.bin", lay_out_torch(tensors, "model"), contents(tensors))
    with path.open("r+b") as file:
        file.write(bytes(8))
    for mmap in (False, True):
        with pytest.raises(Exception, match=r"."):
            torch.load(path, weights_only=True, mmap=mmap)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "model/data.pkl"
    with pytest.raises(shardmerge.CheckpointError):
        shardmerge.inspect(path)


@pytest.mark.parametrize("shape", [(1 << 40, 1 << 40, 0), (1 << 63, 0)])
def test_a_shape_that_torch_cannot_hold(shape):
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.empty(shape)
    with pytest.raises(TargetError) as caught:
        lay_out_torch([("large", DTYPES["F32"], shape)], "model")
    assert caught.value.code == "shape-too-large"
    assert caught.value.where == "large"


def test_the_work_of_a_layout_grows_with_its_tensors():
    tensors = [(f"layers.{number}.weight", DTYPES["BF16"], (4096, 1024)) for number in range(30_000)]
    layout = lay_out_torch(tensors, "model")
    assert len(layout.blobs) == len(tensors) + 1
    small, large = (calls(lambda some=tensors[:number]: lay_out_torch(some, "model")) for number in (1_000, 3_000))
    assert large < 3.3 * small


# The bytes that torch writes


def filled(layout, data_crcs):
    """Returns the layout's blobs with the checksums of the data filled in."""
    blobs = {at: bytearray(raw) for at, raw in layout.blobs}
    starts = sorted(blobs)
    for fields, crc in zip(layout.crc_fields, data_crcs, strict=True):
        for field in fields:
            start = starts[bisect.bisect(starts, field) - 1]
            assert blobs[start][field - start : field - start + 4] == bytes(4)
            blobs[start][field - start : field - start + 4] = struct.pack("<I", crc)
    return blobs


def assert_same_bytes(path, layout, crcs):
    """Compares the blobs with a file of ``torch.save``, which has one record more, the serialization id, at the end."""
    if b"/.storage_alignment" not in layout_start(path):
        pytest.skip("this torch does not write the records of 2.13 yet")
    *blobs, (last_at, last) = filled(layout, crcs).items()
    with path.open("rb") as file:
        for at, raw in blobs:
            file.seek(at)
            assert file.read(len(raw)) == raw, at
        file.seek(last_at)
        rest = file.read()
    ours, theirs = last.index(b"PK\x01\x02"), rest.index(b"PK\x01\x02")
    assert rest[:ours] == last[:ours]
    assert b".data/serialization_id" in rest[ours:theirs]
    directory = last[ours : last.index(b"PK\x06\x06")]
    extra = rest[theirs : rest.index(b"PK\x06\x06")].removeprefix(directory)
    assert extra.count(b"PK\x01\x02") == 1
    assert extra.startswith(b"PK\x01\x02")
    assert b"/.data/serialization_id" in extra


def layout_start(path):
    """Returns the start of a file, up to its first tensor's data if that is large."""
    with path.open("rb") as file:
        return file.read(1 << 20)


def computed_offsets():
    """Lets torch compute where storages lie, which trusts the layout of ``torch.save``; in its debug mode it compares
    the results with the local headers."""
    config = pytest.importorskip("torch.utils.serialization").config
    if not hasattr(getattr(config, "load", None), "calculate_storage_offsets"):
        pytest.skip("this torch always reads the headers")
    return config.patch({"load.calculate_storage_offsets": True})


@settings(max_examples=60, deadline=None)
@given(TENSORS.map(lambda tensors: {f"t{name}": kind for name, kind in tensors.items()}))  # pickle shares one letter
@example({f"t{number}": (DTYPES["F32"], (number, 300, 1)) for number in range(300)})
@example({f"t{number}": (DTYPES["U16"], ()) for number in range(1001)})
@example({f"t{number}": (DTYPES["F32"], (0, 70_000, 70_000)) for number in range(2000)})
@example({"one": (DTYPES["F8_E4M3"], (1, 2, 3, 4, 5))})
def test_the_bytes_are_those_of_torch_save(place, tensors):
    tensors = of(tensors)
    data = contents(tensors)
    layout = lay_out_torch(tensors, "archive")
    path = place.with_name("archive.bin")
    torch.save(as_tensors(tensors, data), path)
    assert_same_bytes(path, layout, [zlib.crc32(raw) for raw in data])
    whole = path.read_bytes()
    assert all(whole[at : at + len(raw)] == raw for at, raw in zip(layout.offsets, data, strict=True))


def zeros_crc(size):
    """Returns the CRC-32 of zeros by doubling."""
    crc, unit, width = 0, binascii.crc32(b"\0"), 1
    while size:
        if size & 1:
            crc = combine(crc, unit, width)
        unit, width, size = combine(unit, unit, width), 2 * width, size >> 1
    return crc


def large():
    """A first tensor of over 4 GiB, and small ones whose headers lie past it."""
    return [
        ("large", DTYPES["U8"], ((1 << 32) + 5,)),
        ("small", DTYPES["F32"], (3,)),
        ("empty", DTYPES["F32"], (0,)),
        ("last", DTYPES["BF16"], (7, 5)),
    ]


def first_size_before(header):
    """Returns the size of a first tensor after which the next local header begins at ``header``."""
    start = lay_out_torch([("t", DTYPES["U8"], (1 << 31,)), ("u", DTYPES["U8"], (4,))], "archive").offsets[0]
    return header - start - 16


# Around the numbers where the zip64 fields begin: of a size, and of the offset of a header.
NEAR = [WIDE - 1, WIDE, first_size_before(WIDE) - 1, first_size_before(WIDE)]


@pytest.mark.skipif(not hasattr(torch.serialization, "skip_data"), reason="needs torch 2.6, to save without the data")
@pytest.mark.parametrize("size", NEAR)
def test_zip64_begins_where_torch_begins_it(tmp_path, size):
    tensors = [("t", DTYPES["U8"], (size,)), ("u", DTYPES["U8"], (4,))]
    layout = lay_out_torch(tensors, "archive")
    header = layout.blobs[1][0] + layout.blobs[1][1].index(b"PK\x03\x04")
    assert (header >= WIDE) == (b"archive/data/1\x01\x00\x08\x00" in layout.blobs[1][1])
    hole = torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=torch.uint8)
    path = tmp_path / "archive.bin"
    with torch.serialization.skip_data():
        torch.save(collections.OrderedDict(t=hole, u=torch.zeros(4, dtype=torch.uint8)), path)
    assert_same_bytes(path, layout, [0, 0])  # torch computes no checksums then


def test_a_file_of_more_than_4_gib(tmp_path, monkeypatch):
    """The file is one hole, but for the last byte of each tensor."""
    tensors = large()
    layout = lay_out_torch(tensors, "model")
    assert all(offset % 64 == 0 for offset in layout.offsets)
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors]
    marks = [bytes([17 * index]) if size else b"" for index, size in enumerate(sizes, 1)]
    crcs = [
        combine(zeros_crc(size - 1), zlib.crc32(mark), 1) if size else 0
        for size, mark in zip(sizes, marks, strict=True)
    ]
    path = tmp_path / "model.bin"
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for offset, raw in filled(layout, crcs).items():
            file.seek(offset)
            file.write(raw)
        for offset, size, mark in zip(layout.offsets, sizes, marks, strict=True):
            file.seek(offset + size - len(mark))
            file.write(mark)
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no holes")
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with computed_offsets():
        found = torch.load(path, weights_only=True, mmap=True)
    assert [tuple(tensor.shape) for tensor in found.values()] == [shape for _, _, shape in tensors]
    ends = [bytes(tensor.view(-1).view(torch.uint8)[-1:].tolist()) for tensor in found.values()]
    assert ends == marks
    assert found["large"][0].item() == found["large"][1 << 31].item() == 0
    catalog = shardmerge.inspect(path)
    assert catalog["last"].shape == (7, 5)
    with zipfile.ZipFile(path) as archive:
        assert [info.file_size for info in archive.infolist()][4:8] == [(1 << 32) + 5, 12, 0, 70]
        assert archive.read("model/version") == b"3\n"
        assert [archive.read(f"model/data/{key}") for key in (1, 2, 3)] == [
            bytes(max(size - 1, 0)) + mark for size, mark in zip(sizes[1:], marks[1:], strict=True)
        ]


def test_torch_computes_the_same_offsets(tmp_path, monkeypatch):
    kinds = itertools.cycle([(DTYPES["F32"], (5,)), (DTYPES["U8"], (0,)), (DTYPES["BF16"], ()), (DTYPES["I8"], (3,))])
    tensors = [(f"t{number}", *next(kinds)) for number in range(120)]
    data = contents(tensors)
    path = write(tmp_path / "model.bin", lay_out_torch(tensors, "model"), data)
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with computed_offsets():
        assert_loads(path, as_tensors(tensors, data), mmap=True)
