"""The torch files that are laid out here, against torch: what it reads from them, and the bytes it writes itself."""

from __future__ import annotations

import binascii
import collections
import itertools
import math
import os
import random
import shutil
import struct
import subprocess
import time
import zipfile
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shardmerge
from shardmerge.dtypes import DTYPES
from shardmerge.errors import TargetError
from shardmerge.execute.checksum import combine
from shardmerge.targets.torch_layout import lay_out_torch

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


@settings(max_examples=150, deadline=None)
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
    path = write(tmp_path / "model.bin", lay_out_torch(tensors, "mödel"), contents(tensors))
    result = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


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
    with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.BadZipFile):
        archive.testzip()
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


def test_many_tensors_are_laid_out_in_seconds():
    tensors = [(f"layers.{number}.weight", DTYPES["BF16"], (4096, 1024)) for number in range(100_000)]
    started = time.process_time()
    layout = lay_out_torch(tensors, "model")
    assert time.process_time() - started < 10  # about 2
    assert len(layout.blobs) == len(tensors) + 1


# The bytes that torch writes

SERIALIZATION_ID = b".data/serialization_id"


class Sink:
    """A file that keeps the small writes of ``torch.save`` and forgets the data of large tensors."""

    def __init__(self):
        self.nbytes = 0
        self.parts = []

    def write(self, data):
        kept = bytes(data) if len(data) < 1 << 24 else None
        if kept is not None:
            self.parts.append((self.nbytes, kept))
        self.nbytes += len(data)
        return len(data)

    def flush(self):
        """Nothing is buffered."""


def saved(tensors):
    """Returns what ``torch.save`` writes, or skips the test with a torch that writes other records."""
    sink = Sink()
    torch.save(tensors, sink)
    if not any(part.endswith(b"/.storage_alignment") for _, part in sink.parts):
        pytest.skip("this torch does not write the records of 2.13 yet")
    return sink


def without_id(sink):
    """Returns the records before the serialization id, and the directory's entries without the one for it."""
    last = max(index for index, (_, part) in enumerate(sink.parts) if part.endswith(b"archive/" + SERIALIZATION_ID))
    records = sink.parts[: last - 1]  # its local header is a write of its own
    directory = next(part for _, part in sink.parts[last:] if part.startswith(b"PK\x01\x02"))
    return records, directory[: directory.rindex(b"PK\x01\x02")]


def filled(layout, data_crcs):
    """Returns the layout's blobs with the checksums of the data filled in."""
    blobs = {at: bytearray(raw) for at, raw in layout.blobs}
    starts = sorted(blobs)
    for fields, crc in zip(layout.crc_fields, data_crcs, strict=True):
        for field in fields:
            start = max(at for at in starts if at <= field)
            assert blobs[start][field - start : field - start + 4] == bytes(4)
            blobs[start][field - start : field - start + 4] = struct.pack("<I", crc)
    return blobs


def assert_torch_writes(tensors, layout, crcs):
    """Compares the blobs with ``torch.save``: all that comes before the serialization id, and the directory."""
    records, directory = without_id(saved(tensors))
    blobs = filled(layout, crcs)
    starts = sorted(blobs)
    data = set(layout.offsets)
    for at, part in records:
        if at in data and not any(at == start for start in starts):
            continue  # a tensor's bytes
        start = max(start for start in starts if start <= at)
        assert bytes(blobs[start][at - start : at - start + len(part)]) == part, at
    last = bytes(blobs[starts[-1]])
    begin = last.index(b"PK\x01\x02")
    assert records[-1][0] + len(records[-1][1]) == starts[-1] + begin  # nothing more before the directory
    assert last[begin : begin + len(directory)] == directory
    assert last[begin + len(directory) :].startswith(b"PK\x06\x06")


@settings(max_examples=60, deadline=None)
@given(TENSORS.map(lambda tensors: {f"t{name}": kind for name, kind in tensors.items()}))  # pickle shares one letter
@example({f"t{number}": (DTYPES["F32"], (number, 300, 1)) for number in range(300)})
@example({f"t{number}": (DTYPES["U16"], ()) for number in range(1001)})
@example({f"t{number}": (DTYPES["F32"], (0, 70_000, 70_000)) for number in range(2000)})
@example({"one": (DTYPES["F8_E4M3"], (1, 2, 3, 4, 5))})
def test_the_bytes_are_those_of_torch_save(tensors):
    tensors = of(tensors)
    data = contents(tensors)
    crcs = [zlib.crc32(raw) for raw in data]
    assert_torch_writes(as_tensors(tensors, data), lay_out_torch(tensors, "archive"), crcs)


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
NEAR = sorted({WIDE - 1, WIDE, WIDE + 1, *(first_size_before(WIDE) + step for step in (-1, 0, 1))})


@pytest.mark.parametrize("size", NEAR)
def test_zip64_begins_where_torch_begins_it(size, monkeypatch):
    tensors = [("t", DTYPES["U8"], (size,)), ("u", DTYPES["U8"], (4,))]
    layout = lay_out_torch(tensors, "archive")
    headers = [at + raw.rindex(b"PK\x03\x04") for at, raw in layout.blobs[:2]]
    assert (headers[1] >= WIDE) == (b"\x01\x00\x08\x00" in layout.blobs[1][1])
    made = collections.OrderedDict(t=torch.zeros(1, dtype=torch.uint8), u=torch.zeros(4, dtype=torch.uint8))
    made["t"] = torch.empty(size, dtype=torch.uint8)
    assert_torch_writes(made, layout, [zeros_crc(size), zlib.crc32(bytes(4))])


def test_a_file_of_more_than_4_gib(tmp_path, monkeypatch):
    """The data is never written: the file is a hole, and its checksums are those of zeros."""
    tensors = large()
    layout = lay_out_torch(tensors, "model")
    assert all(offset % 64 == 0 for offset in layout.offsets)
    crcs = [zeros_crc(math.prod(shape) * dtype.itemsize) for _, dtype, shape in tensors]
    path = tmp_path / "model.bin"
    marks = {0: b"\x11", 1: b"\x22", 3: b"\x33"}  # the last byte of each tensor's data that is read back
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for offset, raw in filled(layout, crcs).items():
            file.seek(offset)
            file.write(raw)
        for index, mark in marks.items():
            _, dtype, shape = tensors[index]
            file.seek(layout.offsets[index] + math.prod(shape) * dtype.itemsize - 1)
            file.write(mark)
    if os.stat(path).st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no holes")
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # torch then checks the offsets that it computes
    found = torch.load(path, weights_only=True, mmap=True)
    assert [tuple(tensor.shape) for tensor in found.values()] == [shape for _, _, shape in tensors]
    for index, mark in marks.items():
        assert found[tensors[index][0]].view(-1).view(torch.uint8)[-1].item() == mark[0]
    assert found["large"][0].item() == found["large"][1 << 31].item() == 0
    catalog = shardmerge.inspect(path)
    assert catalog["last"].shape == (7, 5)
    with zipfile.ZipFile(path) as archive:
        assert [info.file_size for info in archive.infolist()][4:8] == [(1 << 32) + 5, 12, 0, 70]
        assert archive.read("model/version") == b"3\n"


def test_torch_computes_the_same_offsets(tmp_path, monkeypatch):
    """``calculate_storage_offsets`` trusts the layout of ``torch.save``, and reads no local header."""
    config = pytest.importorskip("torch.utils.serialization").config
    if not hasattr(getattr(config, "load", None), "calculate_storage_offsets"):
        pytest.skip("this torch always reads the headers")
    kinds = itertools.cycle([(DTYPES["F32"], (5,)), (DTYPES["U8"], (0,)), (DTYPES["BF16"], ()), (DTYPES["I8"], (3,))])
    tensors = [(f"t{number}", *next(kinds)) for number in range(120)]
    data = contents(tensors)
    path = write(tmp_path / "model.bin", lay_out_torch(tensors, "model"), data)
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with config.patch({"load.calculate_storage_offsets": True}):
        assert_loads(path, as_tensors(tensors, data), mmap=True)
