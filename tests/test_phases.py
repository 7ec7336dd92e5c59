"""The laws of the layout, on files that the reference reads: nothing moves but the order, and phases are kept."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.dtypes import DTYPES
from shardmerge.plan.clones import BLOCK, SMALLEST, clones
from shardmerge.plan.shard import PlannedShard
from shardmerge.tensors.natural_order import natural_key

DTYPE_NAMES = ("I64", "F32", "BF16", "U8")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says, read by a parser of this test's own."""

    start: int
    places: Mapping[str, tuple[str, int, int]]  # dtype, absolute offset, bytes; in the order of the data
    padding: int


def read(path: Path) -> Header:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length]
    fields = json.loads(text)
    fields.pop("__metadata__", None)
    order = sorted(fields, key=lambda name: (fields[name]["data_offsets"], natural_key(name)))
    places = {
        name: (fields[name]["dtype"], 8 + length + fields[name]["data_offsets"][0],
               fields[name]["data_offsets"][1] - fields[name]["data_offsets"][0])
        for name in order
    }  # fmt: skip
    assert sum(nbytes for _, _, nbytes in places.values()) == len(data) - 8 - length
    return Header(8 + length, places, len(text) - len(text.rstrip(b" ")))


def write(path: Path, tensors: Mapping[str, tuple[str, bytes]], phase: int) -> None:
    """Writes tensors in the order given, the first at ``phase`` modulo the block, aligned or not."""
    fields, cursor = {}, 0
    for name, (dtype, data) in tensors.items():
        shape = [len(data) // DTYPES[dtype].itemsize, 1]  # [0] would be what ZeRO-3 leaves of a parameter
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [cursor, cursor + len(data)]}
        cursor += len(data)
    text = json.dumps(fields).encode()
    text = text.ljust(len(text) + (phase - 8 - len(text)) % BLOCK)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, data in tensors.values()))


# Sizes in bytes: whole blocks, ragged ones, small ones, none; with the smallest range that is cloned in between.
whole = st.integers(16, 20).map(lambda n: n * BLOCK)
ragged = st.integers(0, SMALLEST // 8 + 1000).map(lambda n: 8 * n)
sizes = st.one_of(whole, whole, ragged, st.integers(0, 9).map(lambda n: 8 * n))
tensor_lists = st.one_of(
    st.lists(st.tuples(st.sampled_from(DTYPE_NAMES), size), min_size=1, max_size=5) for size in (whole, sizes)
)
# Two phases that meet, one that is rare, and any.
phases = st.one_of(st.sampled_from([8, 8, 1024]), st.integers(0, BLOCK - 1))
files = st.lists(st.tuples(tensor_lists, phases), min_size=1, max_size=3)
shard_sizes = st.one_of(st.none(), st.none(), st.integers(1, 1 << 20))


@given(files, st.booleans(), shard_sizes)
def test_layout_laws(made: list[tuple[list[tuple[str, int]], int]], half: bool, shard_size: int | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = dict(_sources(folder, made))
        lines = [f"  s{n}: s{n}.safetensors" for n in range(len(made))]
        rules = [f'  s{n}.{{rest...}}: "s{n}:{{rest...}}"' for n in range(len(made))]
        dtype = ", dtypes: {'s0.{rest...}': float16}" if half and any(k == "F32" for k, _ in made[0][0]) else ""
        text = ["shardmerge: 1", "sources:", *lines, f"output: {{path: out{dtype}}}", "tensors:", *rules]
        (folder / "m.yaml").write_text("\n".join(text))
        options = sm.Options(sync=False, shard_size=shard_size)
        result = sm.run(folder / "m.yaml", options=options)
        for shard in result.plan.shards:
            held = sum(tensor.nbytes for tensor in shard.tensors)
            assert shard_size is None or held <= shard_size or sum(t.nbytes > 0 for t in shard.tensors) == 1
            _check_shard(folder, shard, wanted, half=bool(dtype))


def _sources(folder: Path, made: list[tuple[list[tuple[str, int]], int]]) -> Iterator[tuple[str, tuple[str, bytes]]]:
    rng = np.random.default_rng(0)
    for number, (tensors, phase) in enumerate(made):
        # Finite in every float type: bytes below 0x40.
        held = {f"t.{'abcde'[i]}": (dtype, rng.integers(0, 64, nbytes, np.uint8).tobytes())
                for i, (dtype, nbytes) in enumerate(tensors)}  # fmt: skip
        write(folder / f"s{number}.safetensors", held, phase)
        yield from ((f"s{number}.{name}", value) for name, value in held.items())


def _check_shard(folder: Path, shard: PlannedShard, wanted: Mapping[str, tuple[str, bytes]], *, half: bool) -> None:
    path = folder / "out" / shard.name
    found = read(path)
    loaded = load_file(path)  # the reference: refuses holes and overlaps
    assert loaded.keys() == found.places.keys() == {tensor.name for tensor in shard.tensors}
    cursor = found.start
    for name, (dtype, offset, nbytes) in found.places.items():
        assert offset == cursor
        assert offset % DTYPES[dtype].itemsize == 0
        cursor += nbytes
        source_dtype, data = wanted[name]
        if half and name.startswith("s0.") and source_dtype in ("F32", "BF16"):
            assert dtype == "F16"
            continue
        assert (dtype, loaded[name].view(torch.uint8).numpy().tobytes()) == (source_dtype, data)
    assert found.start % 8 == 0
    assert found.padding < BLOCK
    ranges = list(clones(shard))
    written = path.read_bytes()
    for one in ranges:
        assert not (one.start | one.offset | one.nbytes) % BLOCK
        assert one.nbytes >= SMALLEST
        source = Path(one.file).read_bytes()
        assert written[one.offset : one.end] == source[one.start : one.start + one.nbytes]
    assert all(before.end <= after.offset for before, after in pairwise(ranges))
    if sum(tensor.nbytes for tensor in shard.tensors) < SMALLEST:
        order = sorted((name for name in found.places if found.places[name][2]), key=natural_key)
        by_size = sorted(order, key=lambda name: -DTYPES[found.places[name][0]].itemsize)
        assert [name for name in found.places if found.places[name][2]] == by_size
        assert found.start % BLOCK == 0


def test_a_renamed_file_keeps_all_but_its_edges(tmp_path: Path) -> None:
    """Ragged tensors in the middle of a run, and names that sort otherwise, cost nothing."""
    sizes = {"z": 100_000, "b": 33_333, "layers.10": 65_536, "layers.2": 777, "norm": 5}
    save_file({name: torch.randn(n) for name, n in sizes.items()}, tmp_path / "in.safetensors")
    shard = _plan(tmp_path, {"x.{rest...}": "s0:{rest...}"}).shards[0]
    (one,) = clones(shard)
    total = 4 * sum(sizes.values())
    assert total - 2 * BLOCK < one.nbytes <= total
    assert shard.nbytes - one.end < BLOCK


def test_ragged_runs_of_two_files_follow_each_other_where_phases_meet(tmp_path: Path) -> None:
    """The second file begins, by its header, just where the first one ends modulo the block."""
    rng = np.random.default_rng(1)
    first = {"a": ("U8", rng.bytes(3 * SMALLEST + 104))}
    write(tmp_path / "s0.safetensors", first, 24)
    second = {"b": ("U8", rng.bytes(SMALLEST + BLOCK))}
    write(tmp_path / "s1.safetensors", second, 24 + 104)
    save_file({"c": torch.arange(9)}, tmp_path / "s2.safetensors")
    shard = _plan(tmp_path, {"a": "s0:a", "b": "s1:b", "0": "s2:c"}, count=3).shards[0]
    assert [Path(one.file).name for one in clones(shard)] == ["s0.safetensors", "s1.safetensors"]
    assert [tensor.name for tensor in shard.tensors] == ["a", "b", "0"]  # I64 behind them, aligned to 8


def test_a_source_file_is_kept_together_where_its_shard_has_room(tmp_path: Path) -> None:
    """The layers of two files alternate, and the head comes first by name: all of it can be cloned all the same."""
    rng = np.random.default_rng(3)
    layers = [{f"layers.{i}": ("U8", rng.bytes(SMALLEST + BLOCK)) for i in range(n, 12, 2)} for n in (0, 1)]
    layers[1] |= {"head": ("U8", rng.bytes(SMALLEST))}
    for number, (tensors, phase) in enumerate(zip(layers, (8, 1024), strict=True)):
        write(tmp_path / f"s{number}.safetensors", tensors, phase)
    rules = {f"{name}": f"s{number}:{name}" for number, tensors in enumerate(layers) for name in tensors}
    small = _plan(tmp_path, rules, count=2, options=sm.Options(shard_size=8 * SMALLEST))
    assert [{tensor.entry.source for tensor in shard.tensors} for shard in small.shards] == [{"s1"}, {"s0"}]
    assert [len(list(clones(shard))) for shard in small.shards] == [1, 1]
    large = _plan(tmp_path, rules, count=2)
    assert [{tensor.entry.source for tensor in shard.tensors} for shard in large.shards] == [{"s0", "s1"}]
    cast = _plan(tmp_path, rules, count=2, options=sm.Options(shard_size=8 * SMALLEST, format="bin"))
    assert [tensor.name for tensor in cast.tensors()] == sorted(rules, key=natural_key)  # nothing to be gained


def test_a_tail_that_would_misalign_what_follows_is_not_cloned(tmp_path: Path) -> None:
    tensors = {"a": ("BF16", bytes(SMALLEST * 2)), "b": ("BF16", bytes(10))}
    write(tmp_path / "s0.safetensors", tensors, 0)
    save_file({"c": torch.arange(3)}, tmp_path / "s1.safetensors")
    shard = _plan(tmp_path, {"a": "s0:a", "b": "s0:b", "c": "s1:c"}, count=2).shards[0]
    assert [tensor.name for tensor in shard.tensors] == ["a", "c", "b"]
    assert len(list(clones(shard))) == 1


def test_views_in_order_are_cloned_and_others_are_not(tmp_path: Path) -> None:
    save_file({"qkv": torch.randn(768, 256), "w": torch.randn(256, 512)}, tmp_path / "s0.safetensors")
    rules = {
        "q": "{op: slice, of: 's0:qkv', dim: 0, start: 256, stop: 768}",
        "t": "{op: transpose, of: 's0:w', dim0: 0, dim1: 1}",
        "r": "{op: reshape, of: 's0:w', shape: [512, 256]}",
    }
    shard = _plan(tmp_path, rules, count=1, quote=False).shards[0]
    cloned = sum(one.nbytes for one in clones(shard))
    assert 2 * 512 * 256 * 4 - 4 * BLOCK < cloned <= 2 * 512 * 256 * 4
    assert shard.tensors[-1].name == "t"


def test_a_copy_elsewhere_and_another_path_give_the_same_layout(tmp_path: Path) -> None:
    """Which file comes first is a matter of names in the output, not of paths."""
    for place, names in (("x", ("m", "n")), ("y", ("n", "m"))):
        (tmp_path / place).mkdir()
        for source, file in zip(("s0", "s1"), names, strict=True):
            data = {source: ("U8", (b"0" if source == "s0" else b"1") * (SMALLEST + BLOCK))}
            write(tmp_path / place / f"{file}.safetensors", data, 0)
            os.utime(tmp_path / place / f"{file}.safetensors", ns=(1, 1))
        sources = f"{{s0: {names[0]}.safetensors, s1: {names[1]}.safetensors}}"
        text = f"shardmerge: 1\nsources: {sources}\ntensors: {{b: 's0:s0', a: 's1:s1'}}\n"
        (tmp_path / place / "m.yaml").write_text(text)
    assert sm.plan(tmp_path / "x" / "m.yaml").id == sm.plan(tmp_path / "y" / "m.yaml").id


def test_a_torch_file_is_never_cloned(tmp_path: Path) -> None:
    """It holds the CRC-32 of every tensor."""
    save_file({"a": torch.zeros(1 << 18)}, tmp_path / "s0.safetensors")
    shard = _plan(tmp_path, {"a": "s0:a"}, count=1, options=sm.Options(format="bin")).shards[0]
    assert not list(clones(shard))


def _plan(
    folder: Path, rules: Mapping[str, str], count: int = 0, *, quote: bool = True, options: sm.Options | None = None
) -> sm.Plan:
    sources = [f"s{n}: s{n}.safetensors" for n in range(count)] or ["s0: in.safetensors"]
    lines = [f'  "{name}": ' + (f'"{rule}"' if quote else rule) for name, rule in rules.items()]
    text = ["shardmerge: 1", f"sources: {{{', '.join(sources)}}}", "tensors:", *lines]
    (folder / "m.yaml").write_text("\n".join(text))
    return sm.plan(folder / "m.yaml", options)
