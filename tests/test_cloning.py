"""Cloning on real file systems: XFS and btrfs share, ext4 copies, the bytes are the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.storage.cloning import can_clone, clone_range
from shardmerge.storage.reading import file_system
from tests.conftest import shardmerge

Disk = Callable[[str], Path]
BLOCK = 4096

RENAME = """\
shardmerge: 1
sources: {src: in.safetensors}
output: out
tensors:
  x.{rest...}: "src:{rest...}"
"""


@pytest.fixture(params=["xfs", "btrfs"])
def sharing(request: pytest.FixtureRequest, disk: Disk) -> Iterator[Path]:
    """An empty directory on a file system that clones."""
    yield from _empty(disk(request.param))


@pytest.fixture
def ext4(disk: Disk) -> Iterator[Path]:
    """An empty directory on one that does not."""
    yield from _empty(disk("ext4"))


def _empty(root: Path) -> Iterator[Path]:
    folder = root / "case"
    folder.mkdir()
    yield folder
    subprocess.run(["chattr", "-R", "-i", str(folder)], check=False, capture_output=True)
    shutil.rmtree(folder)


def model(folder: Path) -> dict[str, torch.Tensor]:
    """Writes a source of 32 MB whose tensors end anywhere in a block, synced, and returns them.

    The reference writes fp32 first: the two small ones lie in the first block of the data, with the header before them.
    """
    tensors = {"bias": torch.randn(33), "norm": torch.randn(5)}
    tensors |= {f"layers.{n}.w": torch.randn(100_003).bfloat16() for n in (10, 2)}
    tensors |= {f"layers.{n}.big": torch.randn(2048, 2049).bfloat16() for n in (10, 2, 30)}
    tensors |= {"head": torch.randn(1024, 3000).bfloat16()}
    save_file(tensors, folder / "in.safetensors", metadata={"format": "pt"})
    (folder / "m.yaml").write_text(RENAME)
    subprocess.run(["sync", "-f", str(folder)], check=True)
    return tensors


def cloned_names(tensors: dict[str, torch.Tensor]) -> set[str]:
    """All but those that lie in the first block."""
    return {f"x.{name}" for name in tensors} - {"x.bias", "x.norm"}


def used(folder: Path) -> int:
    """The bytes that the file system of a folder has given out, everything written."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        subprocess.run(["sync", "-f", str(folder)], check=True)
        status = os.statvfs(fd)
    finally:
        os.close(fd)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def shared_bytes(path: Path) -> int:
    """What the file shares with others, as the file system tells filefrag (FIEMAP)."""
    done = subprocess.run(["filefrag", "-v", "-b4096", str(path)], check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if re.match(r"\s*\d+:", line) and "shared" in line]
    return sum(int(line.split(":")[3]) * BLOCK for line in lines)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_file_system_is_called_by_its_name(sharing: Path, request: pytest.FixtureRequest) -> None:
    """A btrfs subvolume has a device number that no mount has."""
    assert file_system(sharing) == request.node.callspec.params["sharing"]


def test_a_rename_shares_its_blocks(sharing: Path) -> None:
    tensors = model(sharing)
    total = sum(tensor.nbytes for tensor in tensors.values())
    plan = json.loads(shardmerge("plan", sharing / "m.yaml", "--json").stdout)["cost"]
    before = used(sharing)
    found = json.loads(shardmerge("run", sharing / "m.yaml", "--json").stdout)
    assert used(sharing) - before <= total // 100
    assert {key: found[key] for key in ("bytes_cloned", "bytes_copied", "bytes_computed")} == {
        key: plan[key] for key in ("bytes_cloned", "bytes_copied", "bytes_computed")
    }
    assert total - 2 * BLOCK < found["bytes_cloned"] <= total
    assert found["bytes_cloned"] + found["bytes_copied"] == total
    assert found["bytes_read"] == found["bytes_written"] == found["bytes_copied"] < 2 * BLOCK
    assert shared_bytes(sharing / "out" / "model.safetensors") == found["bytes_cloned"]
    written = load_file(sharing / "out" / "model.safetensors")
    assert written.keys() == {f"x.{name}" for name in tensors}
    assert all(torch.equal(written[f"x.{name}"], tensor) for name, tensor in tensors.items())
    (sharing / "in.safetensors").unlink()  # the blocks are the output's own
    assert all(torch.equal(t, load_file(sharing / "out" / "model.safetensors")[name]) for name, t in written.items())


def test_what_people_see(sharing: Path) -> None:
    names = model(sharing)
    line = r"\d\d\.\d\d MB cloned, \d\.\d\d KB copied"
    assert re.search(rf"writes \S+ KB: {line}\n", shardmerge("plan", sharing / "m.yaml").stdout)
    assert re.search(rf"/s\), {line}, peak memory ", shardmerge("run", sharing / "m.yaml").stdout)
    tensors = json.loads((sharing / "out" / "shardmerge.json").read_text())["tensors"]
    assert {name for name, tensor in tensors.items() if "crc32" not in tensor} == cloned_names(names)
    assert {name for name, tensor in tensors.items() if "cloned" in tensor} == cloned_names(names)
    source = (sharing / "in.safetensors").read_bytes()
    for name in cloned_names(names):
        tensor = tensors[name]
        assert tensor["cloned"]["file"] == "in.safetensors"
        start = tensor["cloned"]["offset"]
        data = (sharing / "out" / "model.safetensors").read_bytes()[tensor["offset"] :][: tensor["nbytes"]]
        assert source[start : start + tensor["nbytes"]] == data


def test_ext4_copies_the_same_bytes(sharing: Path, ext4: Path) -> None:
    model(sharing)
    for name in ("in.safetensors", "m.yaml"):
        shutil.copy2(sharing / name, ext4)
    results = {folder: sm.run(folder / "m.yaml") for folder in (sharing, ext4)}
    ours, theirs = (digests(folder / "out") for folder in (sharing, ext4))
    assert ours.pop("shardmerge.json") != theirs.pop("shardmerge.json")  # only one has checksums
    assert ours == theirs
    assert results[sharing].plan.id == results[ext4].plan.id
    assert results[ext4].outcome.bytes_cloned == 0
    assert " cloned" not in shardmerge("plan", ext4 / "m.yaml").stdout
    assert results[ext4].outcome.checksums.keys() == {tensor.name for tensor in results[ext4].plan.tensors()}
    assert not sm.verify(ext4 / "out").unchecked


def test_digests_of_clones_are_those_of_the_output(sharing: Path) -> None:
    """Nobody wrote their bytes: they are read back for it, and then verify leaves nothing unchecked."""
    tensors = model(sharing)
    result = sm.run(sharing / "m.yaml", sha256=True)
    assert set(result.outcome.cloned) == cloned_names(tensors)
    receipt = json.loads((sharing / "out" / "shardmerge.json").read_text())
    path = sharing / "out" / "model.safetensors"
    assert receipt["shards"]["model.safetensors"]["sha256"] == digests(sharing / "out")["model.safetensors"]
    for name, tensor in tensors.items():
        expected = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        assert receipt["tensors"][f"x.{name}"]["sha256"] == expected
    assert not sm.verify(sharing / "out").unchecked
    with path.open("r+b") as file:
        file.seek(receipt["tensors"]["x.head"]["offset"] + 7)
        file.write(b"~")
    with pytest.raises(sm.VerificationError, match=r"x\.head"):
        sm.verify(sharing / "out")


def test_digests_where_nothing_is_left_to_be_written(sharing: Path) -> None:
    """The data of our own files begin on a block: all of this one are cloned."""
    save_file({"w": torch.randn(512, 1024)}, sharing / "in.safetensors")
    first = sm.convert(sharing / "in.safetensors", sharing / "first", dtype="bfloat16")
    result = sm.convert(first.path, sharing / "out", sha256=True)
    assert result.outcome.bytes_cloned == result.plan.tensor_bytes
    receipt = json.loads((sharing / "out" / "shardmerge.json").read_text())
    assert receipt["shards"]["model.safetensors"]["sha256"] == digests(sharing / "out")["model.safetensors"]


def test_another_device_is_copied_from(sharing: Path, ext4: Path) -> None:
    tensors = model(ext4)
    done = json.loads(shardmerge("run", ext4 / "m.yaml", "--out", sharing / "out", "--json").stdout)
    assert done["bytes_cloned"] == 0
    (ext4 / "there.yaml").write_text(RENAME.replace("output: out", f"output: {sharing / 'b'}"))
    assert " cloned" not in shardmerge("plan", ext4 / "there.yaml").stdout
    found = load_file(sharing / "out" / "model.safetensors")
    assert all(torch.equal(found[f"x.{name}"], tensor) for name, tensor in tensors.items())


def test_clones_copies_and_casts_in_one_file(sharing: Path) -> None:
    """Two sources of different phases, one tensor cast, one transposed: each comes its own way, all are right."""
    tensors = model(sharing)
    other = {"pad": torch.zeros(301), "w": torch.randn(256, 300)}
    save_file(other, sharing / "other.safetensors")
    (sharing / "m.yaml").write_text(
        RENAME.replace("src: in.safetensors", "src: in.safetensors, more: other.safetensors")
        .replace("output: out", "output: {path: out, dtypes: {y.cast: bfloat16}}")
        .replace(
            "tensors:\n",
            "tensors:\n  y.w: 'more:w'\n  y.cast: 'more:w'\n  y.pad: 'more:pad'\n"
            "  y.t: {op: transpose, of: 'more:w', dim0: 0, dim1: 1}\n",
        )
    )
    result = sm.run(sharing / "m.yaml")
    found = load_file(sharing / "out" / "model.safetensors")
    assert all(torch.equal(found[f"x.{name}"], tensor) for name, tensor in tensors.items())
    assert torch.equal(found["y.w"], other["w"])
    assert torch.equal(found["y.t"], other["w"].T)
    assert torch.equal(found["y.cast"], other["w"].bfloat16())
    cloned = set(result.outcome.cloned)
    assert cloned == cloned_names(tensors)
    assert set(result.outcome.checksums) == {"y.w", "y.t", "y.cast", "y.pad", "x.bias", "x.norm"}
    assert f"in {len(cloned)} tensors" in sm.verify(sharing / "out").unchecked[0]
    assert not sm.verify(sharing / "out", sources=sharing / "m.yaml").unchecked


def test_verify_says_what_it_did_not_check_and_sources_find_it(sharing: Path) -> None:
    tensors = model(sharing)
    sm.run(sharing / "m.yaml")
    done = shardmerge("verify", sharing / "out")
    total = sum(tensor.nbytes for tensor in tensors.values()) - 4 * (33 + 5)
    assert f"not checked  {total:,} bytes in {len(tensors) - 2} tensors" in done.stdout
    path = sharing / "out" / "model.safetensors"
    with path.open("r+b") as file:  # into a cloned block: the source keeps its own
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    shardmerge("verify", sharing / "out")
    failed = shardmerge("verify", sharing / "out", "--sources", sharing / "m.yaml", code=3)
    assert "[tensor-differs]" in failed.stderr
    failed = shardmerge("verify", sharing / "out", "--reference", path, "--json")
    assert json.loads(failed.stdout)["unchecked"] == []
    for loose in (["--headers"], ["--atol", "1"]):
        assert "not checked" in shardmerge("verify", sharing / "out", "--reference", path, *loose).stdout


def test_a_source_that_is_locked_or_linked_is_cloned(sharing: Path) -> None:
    tensors = model(sharing)
    source = sharing / "in.safetensors"
    os.link(source, sharing / "link")
    source.chmod(0o400)
    subprocess.run(["chattr", "+i", str(source)], check=True)
    before = (source.stat(), hashlib.sha256(source.read_bytes()).digest())
    assert sm.run(sharing / "m.yaml").outcome.bytes_cloned
    after = (source.stat(), hashlib.sha256(source.read_bytes()).digest())
    assert (before[0].st_mtime_ns, before[0].st_ctime_ns, before[1]) == (
        after[0].st_mtime_ns, after[0].st_ctime_ns, after[1],
    )  # fmt: skip
    found = load_file(sharing / "out" / "model.safetensors")
    assert all(torch.equal(found[f"x.{name}"], tensor) for name, tensor in tensors.items())


def test_holes_stay_holes(sharing: Path) -> None:
    from benchmarks.synthetic import write_safetensors

    write_safetensors(sharing / "in.safetensors", {"w": (64 << 20, 4)}, fill=False)  # as large as the whole disk
    (sharing / "m.yaml").write_text(RENAME)
    done = sm.run(sharing / "m.yaml")
    assert done.outcome.bytes_cloned >= (512 << 20) - 2 * BLOCK
    assert (sharing / "out" / "model.safetensors").stat().st_blocks * 512 < 1 << 20


def test_a_clone_needs_no_room(sharing: Path, ext4: Path) -> None:
    """A source of more than half of the disk: shared where that is possible, else refused with nothing written."""
    for folder, code in ((sharing, 0), (ext4, 4)):
        with (folder / "in.safetensors").open("wb") as file:
            nbytes = 300 << 20
            text = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
            text = text.ljust(-(-len(text) // 8) * 8)
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + nbytes)
        (folder / "m.yaml").write_text(RENAME)
        done = shardmerge("run", folder / "m.yaml", "-q", code=code)
        assert ("[disk-too-small]" in done.stderr) == bool(code)
        assert (folder / "out").exists() == (not code)


def test_a_killed_run_starts_again(sharing: Path) -> None:
    """Killed when the first shard was cloned and another was being made."""
    tensors = model(sharing)
    wide = {f"z.{n}": torch.randn(1 << 20) for n in range(20)}
    save_file(wide, sharing / "wide.safetensors")
    mapping = sharing / "m.yaml"
    mapping.write_text(
        RENAME.replace("src: in.safetensors", "src: in.safetensors, wide: wide.safetensors").replace(
            "output: out", "output: {path: out, shard_size: 30MB, dtypes: {'y.{rest...}': bfloat16}}"
        )
        + "  y.{rest...}: 'wide:{rest...}'\n"
    )
    command = [sys.executable, "-m", "shardmerge", "run", str(mapping), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(sharing.glob("out.partial-*/model/model-0000*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        pytest.skip("the machine was faster than the signal")
    assert not (sharing / "out").exists()
    result = sm.run(mapping)
    assert result.outcome.bytes_cloned
    assert not list(sharing.glob("out.partial-*"))
    found: dict[str, torch.Tensor] = {}
    for path in (sharing / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert all(torch.equal(found[f"x.{name}"], tensor) for name, tensor in tensors.items())
    assert all(torch.equal(found[f"y.{name}"], tensor.bfloat16()) for name, tensor in wide.items())


def test_a_plan_leaves_no_trace(sharing: Path) -> None:
    model(sharing)
    (sharing / "m.yaml").write_text(RENAME.replace("output: out", "output: deep/er/out"))
    before = {path: path.stat().st_mtime_ns for path in (sharing, *sharing.iterdir())}
    shardmerge("plan", sharing / "m.yaml")
    assert {path: path.stat().st_mtime_ns for path in (sharing, *sharing.iterdir())} == before


def test_where_nothing_can_be_cloned_the_probe_says_so(tmp_path: Path) -> None:
    """tmpfs cannot; no more can a folder that is not there, a source that is gone, a range beyond the end."""
    source = tmp_path / "source"
    source.write_bytes(bytes(2 * BLOCK))
    assert not can_clone(source, 0, BLOCK, Path("/dev/shm"))
    assert not can_clone(source, 0, BLOCK, tmp_path / "nowhere")
    assert not can_clone(tmp_path / "gone", 0, BLOCK, tmp_path)
    with source.open("rb") as read, (tmp_path / "target").open("wb") as write:
        assert not clone_range(read.fileno(), 0, write.fileno(), 0, 3 * BLOCK)
