"""SHA-256 of files and tensors: as hashlib has them of what lies on the disk; of what was written, or refused."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.execute.digests import Follower
from shardmerge.packed_names import PackedName
from shardmerge.plan.memory import READ_BACK
from shardmerge.plan.tasks import batches, front_to_back
from shardmerge.publish.making import receipt_path
from shardmerge.publish.running import finish_plan, make_some
from shardmerge.publish.shares import Share
from shardmerge.publish.staging import Staging, stagings
from shardmerge.storage.writing import OutputFile
from shardmerge.tensors import Extent, dense
from tests.conftest import GOLDEN
from tests.receipts import receipt_of, write_receipt

MIB = 1 << 20
FORMATS = ("safetensors", "bin", "dcp")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of several buffers, small ones, some without elements, and not in the order of a result."""
    folder = tmp_path_factory.mktemp("digests")
    rng = np.random.default_rng(0)
    shapes = {"z.big": (1100, 1024), "m.odd": (33,), "m.none": (0, 7), "a.big": (700, 1024), "a.none": (3, 0)}
    save_file({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}, folder / "s")
    return (folder / "s").rename(folder / "model.safetensors")


def check(out: Path) -> None:
    """Compares every digest of a receipt with what hashlib says of the disk."""
    receipt = receipt_of(out)
    assert (receipt["schema"], receipt["digests"]) == (6, "sha256")
    data = {name: (out / name).read_bytes() for name in receipt["shards"]}
    assert {name: row["sha256"] for name, row in receipt["shards"].items()} == {
        name: sha256(one) for name, one in data.items()
    }
    for row in receipt["tensors"].values():
        assert row["sha256"] == sha256(data[row["shard"]][row["offset"] :][: row["nbytes"]])


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "shardmerge.json"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_digests_are_those_of_the_disk(form: str, dtype: str | None, source: Path, tmp_path: Path) -> None:
    """Of one file and of several; the fields of a torch file that are written last are in it. All else is the same."""
    for size in ("5GB", "3MB"):
        options = sm.Options(format=form, dtype=dtype, shard_size=size, sync=False)
        plain = sm.convert(source, tmp_path / f"{size}-plain", options=options)
        with_them = sm.convert(source, tmp_path / size, options=options, sha256=True)
        check(with_them.path)
        assert files(with_them.path) == files(plain.path)
        assert with_them.plan.id == plain.plan.id
        assert with_them.outcome.bytes_read == plain.outcome.bytes_read
        assert receipt_of(plain.path)["digests"] is None
        assert "SHA-256" in sm.verify(with_them.path).checks[-1]
        assert "SHA-256" not in sm.verify(plain.path).checks[-1]


def test_digests_of_what_an_optimizer_goes_on_from(tmp_path: Path) -> None:
    run = GOLDEN / "zero" / "llama_z2_w2_fp32" / "ckpt"
    check(sm.convert(run, tmp_path / "out", format="zero-universal", optimizer=True, sync=False, sha256=True).path)


def test_every_byte_is_read_back_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of threads; and the sources are not read again for it."""
    seen: list[tuple[int, int]] = []
    read_back = OutputFile.read_back

    def counted(self: OutputFile, offset: int, out: memoryview) -> None:
        seen.append((offset, offset + len(out)))
        read_back(self, offset, out)

    monkeypatch.setattr(OutputFile, "read_back", counted)
    for workers in (1, 4):
        seen.clear()
        done = sm.convert(source, tmp_path / str(workers), workers=workers, sync=False, sha256=True)
        size = (done.path / "model.safetensors").stat().st_size
        assert [start for start, _ in sorted(seen)] == [0, *(end for _, end in sorted(seen))][:-1]
        assert sum(end - start for start, end in seen) == size
        assert done.outcome.bytes_read == done.plan.tensor_bytes
    sm.convert(source, tmp_path / "plain", sync=False)
    assert sum(end - start for start, end in seen) == size  # without it nothing is read back


def scattered(size: int, seed: int) -> Iterator[tuple[int, int]]:
    """Cuts a file into ranges, in a random order."""
    rng = random.Random(seed)
    cuts = sorted({0, size, *(rng.randrange(size) for _ in range(40))})
    ranges = list(pairwise(cuts))
    rng.shuffle(ranges)
    yield from ((start, end - start) for start, end in ranges)


@pytest.mark.parametrize("seed", range(4))
def test_it_waits_for_what_is_not_written_yet(seed: int, source: Path, tmp_path: Path) -> None:
    """Ranges in any order, by four threads: nothing is read before it was written."""
    shard = api.prepare_conversion(source).plan.shards[0]
    data = np.random.default_rng(seed).integers(0, 256, shard.nbytes, np.uint8).tobytes()
    data = shard.blobs[0][1][:8] + data[8:]
    file = OutputFile(tmp_path / "file", shard.nbytes, sync=False, read_back=True)
    follower, ranges = Follower(shard, file), list(scattered(shard.nbytes, seed))

    def work(number: int) -> None:
        for offset, nbytes in ranges[number::4]:
            file.write(offset, memoryview(data)[offset : offset + nbytes])
            follower.wrote(offset, nbytes)
            follower.follow(lambda: True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert follower.digester.sha256 == sha256(data)
    for one in shard.tensors:
        assert follower.digester.of(one.name).sha256 == sha256(data[one.offset :][: one.nbytes])


def test_tensors_are_made_in_the_order_of_the_file(tmp_path: Path) -> None:
    """So that what is read back lies close behind. What is made of compressed files keeps their order."""
    torch.save({name: torch.ones(300, 100) for name in ("z", "m", "a")}, tmp_path / "model.pt")
    shard = api.prepare_conversion(tmp_path / "model.pt").plan.shards[0]
    made = list(batches(shard, 64 << 10))
    offsets = [task.offset for batch in front_to_back(made) for task in batch]
    assert offsets == sorted(offsets) != [task.offset for batch in made for task in batch]
    ends = [task.offset + task.nbytes for batch in front_to_back(made) for task in batch]
    assert offsets[1:] == ends[:-1]
    compressed = Extent(str(PackedName("/ck/__0_0.distcp", 0, 800, 2 * MIB)), 0, 120_000)
    tensors = [replace(one, entry=replace(one.entry, pieces=dense(compressed, one.numel))) for one in shard.tensors[:1]]
    packed = list(batches(replace(shard, tensors=(*shard.tensors[1:], *tensors)), 64 << 10))
    assert front_to_back(packed) == packed


def test_what_cannot_be_read_back_is_no_bug(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:  # of a source
            return preadv(fd, buffers, offset)
        if failing:
            raise OSError(errno.EIO, "Input/output error")
        return 0  # what another process cut off

    monkeypatch.setattr(os, "preadv", broken)
    for failing, said in ((True, "Input/output error"), (False, "the file ends before")):  # noqa: B007  # `broken` asks
        with pytest.raises(sm.OutputError, match=said) as caught:
            sm.convert(source, tmp_path / "out", sync=False, sha256=True)
        assert caught.value.code == "unwritable-output"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "where"), [("safetensors", "tensor"), ("bin", "tensor"), ("safetensors", "header")])
def test_what_another_process_writes_into_the_file_is_noticed(
    form: str, where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = OutputFile.write

    def followed(self: OutputFile, offset: int, data: memoryview) -> None:
        write(self, offset, data)
        if len(data) > 100_000 if where == "tensor" else offset == 8:
            with self.path.open("r+b") as other:
                other.seek(offset + 50)
                other.write(b"~")

    monkeypatch.setattr(OutputFile, "write", followed)
    with pytest.raises(sm.OutputError) as caught:
        sm.convert(source, tmp_path / "out", format=form, workers=1, sync=False, sha256=True)
    assert caught.value.code == "output-changed"
    assert ("header" if where == "header" else "big") in caught.value.found
    assert not (tmp_path / "out").exists()


def parts(source: Path, out: Path, **options: object) -> sm.Plan:
    """Makes all parts of a plan, each task with its own options, and publishes nothing."""
    given = sm.Options(shard_size="3MB", sync=False)
    plan = api.prepare_conversion(source, options=given).plan
    for number in range(2):
        more = {"sha256": options[f"task{number}"]}
        make_some(plan.parts(), Share(number, 2), out, sm.Options(shard_size="3MB", sync=False, workers=1, **more))
    return plan


@pytest.mark.parametrize(
    ("first", "second", "finisher", "there"),
    [(True, True, False, True), (True, False, True, True), (False, False, True, True), (True, False, False, False)],
)
def test_parts_of_several_tasks(
    first: bool, second: bool, finisher: bool, there: bool, source: Path, tmp_path: Path
) -> None:
    """Who publishes takes the digests that are missing, if asked; else they are those of all parts, or absent."""
    out = tmp_path / "out"
    plan = parts(source, out, task0=first, task1=second)
    finish_plan(plan, out, sm.Options(sync=False, sha256=finisher))
    if there:
        check(out)
    assert (receipt_of(out)["digests"] == "sha256") == there
    sm.verify(out)


def test_a_part_that_changed_gets_no_digest(source: Path, tmp_path: Path) -> None:
    """The samples of its receipt miss it; the checksums of what was written do not. --recheck makes it anew."""
    out = tmp_path / "out"
    plan = parts(source, out, task0=False, task1=False)
    staging = Staging.of(out, plan.id)
    assert receipt_path(staging, 0).is_file()
    path = staging.model / plan.shards[0].name
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 + 70_000)
        file.write(b"~~~")
    with pytest.raises(sm.OutputError) as caught:
        finish_plan(plan, out, sm.Options(sync=False, sha256=True))
    assert caught.value.code == "output-changed"
    assert "--recheck" in caught.value.hint
    sm.convert(source, out, shard_size="3MB", sync=False, sha256=True, recheck=True)
    check(out)
    assert not stagings(out)


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    return sm.convert(source, tmp_path / "out", shard_size="3MB", sync=False, sha256=True).path


def test_verify_compares_the_digests(out: Path) -> None:
    """A receipt that was edited, with the digest of itself made anew: bytes that have the CRC-32 are compared too."""
    sound, wrong = receipt_of(out), sha256(b"")
    name = next(name for name, row in sound["tensors"].items() if row["nbytes"])
    shard = sound["tensors"][name]["shard"]
    for rows, key, code in (("tensors", name, "checksum-differs"), ("shards", shard, "file-differs")):
        value = json.loads(json.dumps(sound))
        value[rows][key]["sha256"] = wrong
        write_receipt(out, value)
        with pytest.raises(sm.VerificationError) as caught:
            sm.verify(out)
        assert (caught.value.code, caught.value.expected) == (code, wrong)
        assert shard in caught.value.where
    value["tensors"][name]["sha256"] = wrong
    write_receipt(out, value)
    with pytest.raises(sm.VerificationError, match=name):
        sm.verify(out, tensors=[name])
    sm.verify(out, tensors=[next(other for other in sound["tensors"] if other != name)])


def test_a_digest_that_was_taken_away_or_added_is_noticed(out: Path) -> None:
    sound = receipt_of(out)
    name = next(iter(sound["tensors"]))
    changes = [
        lambda value: value["tensors"][name].pop("sha256"),
        lambda value: value["shards"].popitem()[1].clear(),
        lambda value: value.update(digests=None),
        lambda value: value.pop("digests"),
        lambda value: value.update(digests="sha512"),
        lambda value: value["tensors"][name].update(sha256="x" * 64),
        lambda value: value.update(schema=5),
    ]
    for change in changes:
        value = json.loads(json.dumps(sound))
        change(value)
        write_receipt(out, value)
        with pytest.raises(sm.VerificationError) as caught:
            sm.verify(out)
        assert caught.value.code == "damaged-receipt"


def test_a_tensor_is_verified_alone(out: Path) -> None:
    """Its bytes are compared, and no others: damage elsewhere is not seen, nor is it read."""
    row = receipt_of(out)["tensors"]["z.big"]
    with (out / row["shard"]).open("r+b") as file:
        file.seek(row["offset"] + 5)
        file.write(b"~")
    sm.verify(out, tensors=["a.big"])
    with pytest.raises(sm.VerificationError, match=r"z\.big"):
        sm.verify(out, tensors=["z.big"])
    with pytest.raises(sm.VerificationError) as caught:
        sm.verify(out)
    assert [error.code for error in caught.value.each()] == ["checksum-differs"]  # the tensor, not its file too


@pytest.mark.parametrize("schema", [4, 5])
def test_receipts_of_earlier_versions(schema: int, tmp_path: Path) -> None:
    """Written by the versions that had them. A changed byte is noticed as then; they can be attested and reported."""
    folder = Path(shutil.copytree(GOLDEN / "receipts" / f"schema-{schema}", tmp_path / "out"))
    assert receipt_of(folder)["schema"] == schema
    assert any("the receipt itself" in rest for rest in sm.verify(folder).unchecked) == (schema == 4)
    sm.report(folder)
    path, _ = sm.attest(folder)
    subjects = {one["name"]: one["digest"]["sha256"] for one in json.loads(path.read_bytes())["subject"]}
    assert subjects == {one.name: sha256(one.read_bytes()) for one in folder.iterdir()}
    with next(folder.glob("*.safetensors")).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"~")
    with pytest.raises(sm.VerificationError) as caught:
        sm.verify(folder)
    assert caught.value.code == "checksum-differs"


def test_the_plan_counts_the_buffer(source: Path) -> None:
    prepared = [api.prepare_conversion(source, options=sm.Options(sha256=sha256)) for sha256 in (False, True)]
    plain, with_it = (one.how.peak for one in prepared)
    assert with_it - plain == READ_BACK + 512 * 5
