"""The result appears whole or not at all, and is the same however it was made."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shardmerge as sm
from benchmarks.synthetic import write_zero
from shardmerge import api
from shardmerge.dtypes import DTYPES
from shardmerge.publish import held_files, verify
from shardmerge.publish.recorded import read_recorded
from shardmerge.publish.staging import Staging
from tests.conftest import GOLDEN, shardmerge
from tests.receipts import receipt_of, write_receipt
from tests.staged import assert_well_left, stagings

CASE = GOLDEN / "zero" / "bag_z2_w3_bf16" / "ckpt"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_workers_memory_and_io_never_change_a_byte(tmp_path: Path) -> None:
    tag = write_zero(tmp_path / "run", {f"w{i}": (300, 1000) for i in range(9)}, stage=3, world=3, fill=True)
    settings = [{}, {"workers": 1}, {"workers": 4}, {"io": "pread"}, {"io": "mmap"}, {"memory": 72 << 20, "workers": 1}]
    seen = []
    for number, given in enumerate(settings):
        options = sm.Options(dtype=DTYPES["BF16"], sync=False, shard_size=2_000_000, **given)
        sm.convert(tag, tmp_path / f"out{number}", options=options)
        seen.append(digests(tmp_path / f"out{number}"))
    assert all(found == seen[0] for found in seen)
    assert len(seen[0]) == 3 + 2  # three shards of three tensors, the index, the receipt


def test_shards_follow_the_conventions(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w": torch.full((10, 10), float(i)) for i in range(12)}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "ids": torch.arange(5),
        "half": torch.ones(3).half(),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    sm.convert(tmp_path / "in.safetensors", tmp_path / "out", options=sm.Options(shard_size=1000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    found = {}
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        found |= load_file(tmp_path / "out" / shard)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    order = [int(name.split(".")[1]) for name in sorted(found, key=lambda n: index["weight_map"][n]) if "." in name]
    assert [index["weight_map"][f"layers.{i}.w"] for i in range(12)] == sorted(
        index["weight_map"][f"layers.{i}.w"] for i in range(12)
    )
    assert sorted(order) == list(range(12))


def test_overflow_is_reported_and_infinities_are_kept(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 70000.0, -1e30, float("inf"), float("nan"), 65504.0])
    save_file({"w": values}, tmp_path / "in.safetensors")
    done = shardmerge("convert", tmp_path / "in.safetensors", tmp_path / "out", "--dtype", "float16", "--json")
    assert json.loads(done.stdout)["overflows"] == {"w": 2}
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.equal(found.nan_to_num(nan=7.0), values.half().nan_to_num(nan=7.0))
    done = shardmerge("convert", tmp_path / "in.safetensors", tmp_path / "out2", "--dtype", "float16")
    assert "2 values of w overflowed" in done.stderr


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    sm.convert(CASE, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    start = 8 + int.from_bytes(sound[:8], "little")
    for at in [*rng.integers(start, len(sound), 20), *rng.integers(8, 300, 5)]:
        damaged = bytearray(sound)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(sm.ShardmergeError):
            sm.verify(tmp_path / "out")
    path.write_bytes(sound)
    sm.verify(tmp_path / "out")


def test_verify_finds_what_is_missing_or_edited(tmp_path: Path) -> None:
    sm.convert(CASE, tmp_path / "out")
    receipt = tmp_path / "out" / "shardmerge.json"
    text = receipt.read_text()
    receipt.unlink()
    assert "[no-receipt]" in shardmerge("verify", tmp_path / "out", code=2).stderr
    receipt.write_text("{")
    assert "[damaged-receipt]" in shardmerge("verify", tmp_path / "out", code=3).stderr
    receipt.write_text(text)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "elsewhere")
    assert "[missing-file]" in shardmerge("verify", tmp_path / "out", code=3).stderr


@pytest.mark.parametrize("step", [1, -1])
def test_the_index_comes_after_all_that_it_names(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the receipt after it, in whatever order they were planned: readers take an index for a whole model."""
    placed, place = list[str](), Staging.place
    options = sm.Options(shard_size=1)
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "generation_config.json").write_text('{"max_length": 20}')
    prepared = api.prepare_conversion(tmp_path / "in", options=options)

    def recorded(self: Staging, path: Path, data: bytes | list[bytes]) -> None:
        placed.append(path.name)
        place(self, path, data)

    monkeypatch.setattr(Staging, "place", recorded)
    plan = replace(prepared.plan, side_files=prepared.plan.side_files[::step])
    api.carry_out(replace(prepared, plan=plan), tmp_path / "out", options)
    assert placed[-3:] == ["generation_config.json", "model.safetensors.index.json", "shardmerge.json"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A result with two side files."""
    source = tmp_path / "in"
    source.mkdir()
    save_file({"a": torch.arange(35.0).reshape(7, 5), "b": torch.ones(3)}, source / "model.safetensors")
    (source / "generation_config.json").write_text('{"max_length": 20}')
    sm.convert(source, tmp_path / "out")
    return tmp_path / "out"


def _changed(made: Path, change: str) -> None:
    """Changes a file of a result, or its receipt."""
    shard, side = (made / name for name in ("model.safetensors", "generation_config.json"))
    value = receipt_of(made)
    if change == "file gone":
        side.unlink()
    elif change == "file edited":
        side.write_text('{"max_length": 21}')
    elif change == "shard longer":
        shard.write_bytes(shard.read_bytes() + b"\0")
    elif change == "tensor renamed":
        value["tensors"]["a"]["stored"] = "c"
    elif change == "format":
        value["format"] = "a receipt of somebody else"
    write_receipt(made, value)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("file gone", "missing-file"),
        ("file edited", "file-differs"),
        ("shard longer", "size-differs"),
        ("tensor renamed", "tensors-differ"),
        ("format", "damaged-receipt"),
    ],
)
def test_verify_compares_all_that_the_receipt_says(made: Path, change: str, code: str) -> None:
    sm.verify(made)
    _changed(made, change)
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.verify(made)
    assert caught.value.code == code


def _sealed(made: Path, name: str, old: bytes, new: bytes) -> None:
    """Changes the frame of a shard and its digest, as if we had written it so."""
    path, value = made / name, receipt_of(made)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    value["shards"][name]["frame_sha256"] = held_files.frame_sha256(path, read_recorded(made).within[name])
    write_receipt(made, value)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [(b'"F32","shape":[7,5]', b'"F64","shape":[7,5]', "reference-refuses"), (b"[7,5]", b"[5,7]", "reference-differs")],
)
def test_a_reader_that_is_not_ours_has_its_say(
    made: Path, old: bytes, new: bytes, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ours takes a header for what it is not."""
    tensors = read_recorded(made).within["model.safetensors"]
    entries = held_files.held_tensors(made, "model.safetensors", tensors)
    monkeypatch.setattr(verify, "held_tensors", lambda *given: entries)
    sm.verify(made)
    _sealed(made, "model.safetensors", old, new)
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.verify(made)
    assert caught.value.code == code
    assert caught.value.where == str(made / "model.safetensors")


def test_a_checksum_of_a_torch_file_is_compared_with_its_record(tmp_path: Path) -> None:
    """By Python's zipfile: torch does not look at it."""
    save_file({"a": torch.arange(35.0)}, tmp_path / "model.safetensors")
    sm.convert(tmp_path / "model.safetensors", tmp_path / "out", options=sm.Options(format="bin"))
    sm.verify(tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "pytorch_model.bin") as file:
        central = next(info for info in file.infolist() if "/data/" in info.filename)
    name = central.filename.encode()
    data = (tmp_path / "out" / "pytorch_model.bin").read_bytes()
    at = data.rindex(name) - 46 + 16  # APPNOTE 4.3.12: the CRC-32 of an entry of the directory
    entry = data[at : at + 46 - 16 + len(name)]
    _sealed(tmp_path / "out", "pytorch_model.bin", entry, b"\0\0\0\0" + entry[4:])
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.verify(tmp_path / "out")
    assert caught.value.code == "reference-differs"


def test_verify_against_a_reference_and_diff(tmp_path: Path) -> None:
    sm.convert(CASE, tmp_path / "out")
    assert "equal" in shardmerge("diff", CASE, tmp_path / "out").stdout
    shardmerge("verify", tmp_path / "out", "--reference", CASE)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = next(n for n, t in tensors.items() if t.is_floating_point() and t.dim() == 2)
    tensors[name][0, 0] += 1
    tensors["more"] = torch.ones(1)
    save_file(tensors, tmp_path / "other.safetensors")
    done = shardmerge("diff", tmp_path / "out", tmp_path / "other.safetensors", "--json", code=3)
    found = {row["name"]: row["what"] for row in json.loads(done.stdout)["differences"]}
    assert found == {name: "values", "more": "only in B"}
    assert (
        "[reference-differs]"
        in shardmerge("verify", tmp_path / "out", "--reference", tmp_path / "other.safetensors", code=3).stderr
    )


def test_the_same_numbers_in_another_shape_differ(tmp_path: Path) -> None:
    for name, shape in (("a", (2, 3)), ("b", (3, 2))):
        save_file({"w": torch.ones(shape), "v": torch.tensor([float("nan")])}, tmp_path / f"{name}.safetensors")
    done = shardmerge("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json", code=3)
    assert [(row["name"], row["what"]) for row in json.loads(done.stdout)["differences"]] == [("w", "shape")]


def test_equal_inputs_give_an_equal_plan_wherever_they_lie(tmp_path: Path) -> None:
    ids = set()
    for place in ("here", "there"):
        shutil.copytree(CASE, tmp_path / place / "ckpt")  # with the times of the files
        done = shardmerge("convert", tmp_path / place / "ckpt", tmp_path / "out", "--dry-run", "--json",
                          env={**os.environ, "PYTHONHASHSEED": "7" if place == "here" else "8"})  # fmt: skip
        ids.add(json.loads(done.stdout)["id"])
    assert len(ids) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 5), (signal.SIGTERM, 5), (signal.SIGHUP, 5), (signal.SIGKILL, -9)]
)
def test_a_run_that_is_stopped_publishes_nothing_and_is_gone_on_with(tmp_path: Path, number: int, code: int) -> None:
    tag = write_zero(tmp_path / "run", {f"w{i}": (1000, 4000) for i in range(40)}, stage=2, world=2, fill=False)
    out = tmp_path / "out"
    command = ["convert", tag, out, "--workers", "1", "--shard-size", "80MB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shardmerge", *map(str, command)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob("out.partial-*/parts/*.json")):
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    if process.returncode == 0:
        pytest.skip("the machine was faster than the signal")
    assert process.returncode == code
    assert not out.exists()
    assert "Traceback" not in errors
    if number != signal.SIGKILL:  # nobody can tidy up after a SIGKILL; whoever goes on does
        assert_well_left(out)
        told = re.search(r"hint: to go on: shardmerge (.*)", errors)
        assert told is not None
        command = shlex.split(told[1])
    made = json.loads(shardmerge(*command, "--json").stdout)["parts_made"]
    assert 0 < made < 8
    assert stagings(out) == []
    sm.verify(out)


def test_a_process_that_the_system_ends_is_made_up_for(tmp_path: Path) -> None:
    """As the kernel does where memory runs out: it takes one of those that make parts."""
    tag = write_zero(tmp_path / "run", {f"w{i}": (1000, 4000) for i in range(40)}, stage=2, world=2, fill=False)
    command = ["convert", tag, tmp_path / "out", "--workers", "2", "--shard-size", "80MB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shardmerge", *map(str, command)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(int(found[0]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 4
    assert "[worker-died]" in errors
    assert "found: SIGKILL" in errors
    assert_well_left(tmp_path / "out")
    shardmerge(*command)
    assert stagings(tmp_path / "out") == []
    sm.verify(tmp_path / "out")


def test_a_half_written_shard_is_refused_by_the_reference_reader(tmp_path: Path) -> None:
    """The first eight bytes are written last: until then the header length is zero."""
    from safetensors import SafetensorError

    from shardmerge.storage.writing import OutputFile

    sound = tmp_path / "sound.safetensors"
    save_file({"w": torch.ones(100)}, sound)
    data = sound.read_bytes()
    file = OutputFile(tmp_path / "half.safetensors", len(data))
    file.write(8, memoryview(data)[8:])
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "half.safetensors")
    file.seal(data[:8])
    assert torch.equal(load_file(tmp_path / "half.safetensors")["w"], torch.ones(100))


def test_a_comment_in_the_mapping_changes_no_plan_id(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "m.safetensors")
    text = "shardmerge: 1\nsources: {src: m.safetensors}\noutput: out\ntensors:\n  x: src:w\n"
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("# why it is so\n\n" + text)
    assert sm.plan(tmp_path / "a.yaml").id == sm.plan(tmp_path / "b.yaml").id
    half = sm.plan(tmp_path / "a.yaml", sm.Options(dtype="float16"))
    assert half.id != sm.plan(tmp_path / "a.yaml").id
    assert {tensor.dtype.name for tensor in half.tensors()} == {"F16"}


def test_a_role_that_no_target_has_is_an_error(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "m.safetensors")
    text = "shardmerge: 1\nsources: {src: m.safetensors}\ntensors:\n  x: src:w\ntarget: {name: hf/llava, vison: src}\n"
    (tmp_path / "a.yaml").write_text(text)
    done = shardmerge("plan", tmp_path / "a.yaml", code=2)
    assert "[unknown-role]" in done.stderr
    assert "did you mean `vision`" in done.stderr
