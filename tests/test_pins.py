"""An input never changes unseen: between the plan and the run, in the middle of a run, by descriptor and by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import shardmerge
from shardmerge import api
from shardmerge.errors import CheckpointError
from shardmerge.execute import pins
from shardmerge.plan.value import Plan
from shardmerge.prepare.side_files import SideFiles, content
from shardmerge.tensors import FileStamp

MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of 8 and 4 MiB, a config and a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    random = np.random.default_rng(0)
    shards = {"model-00001-of-00002.safetensors": ("a", 8), "model-00002-of-00002.safetensors": ("b", 4)}
    for shard, (name, size) in shards.items():
        save_file({name: random.integers(0, 255, size * MIB, np.uint8)}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, (name, _) in shards.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "mine", "torch_dtype": "float32"}')
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(n): n for n in range(1000)}}}))
    return folder


# Ways in which a file changes. All but the first keep its size and its time of modification.


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def _overwrite(path: Path) -> None:
    """In place, and the clock of the file put back: `touch -r`, `rsync --times --inplace`."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path) -> None:
    """By a rename, as `rsync --times` and editors do."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    _overwrite(other)
    other.rename(path)


def _delete(path: Path) -> None:
    path.unlink()


CHANGES = [_grow, _overwrite, _replace, _delete]
FILES = ["model-00002-of-00002.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("name", [*FILES, "config.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_plan_is_refused(model: Path, name: str, change: Callable[[Path], None]) -> None:
    """The config is not copied here, it is written anew with another type: what the plan read of it counts."""
    options = api.Options(dtype="bfloat16")
    prepared = api.prepare_conversion(model, options=options)
    change(model / name)
    with pytest.raises(CheckpointError) as caught:
        api.carry_out(prepared, model.parent / "out", options)
    assert (caught.value.code, caught.value.where) == ("source-changed", str(model / name))
    assert [path.name for path in model.parent.iterdir()] == ["model"]


COMMANDS = {
    "grown": "printf x >> {0}",
    "overwritten": "touch -r {0} {0}.t; printf '!!!!' | dd of={0} conv=notrunc bs=1 seek=50 2>&-; touch -r {0}.t {0}",
    "replaced": "cp -p {0} {0}.t; mv {0}.t {0}",
    "truncated": "truncate -s 40 {0}",
    "gone": "rm {0}",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_change_in_the_middle_of_a_run_is_refused(model: Path, name: str, command: str) -> None:
    """By a process of its own, when the first tile is written: the weights that change are not read yet, or partly."""
    written: list[int] = []

    def progress(nbytes: int) -> None:
        if not written:
            subprocess.run(["sh", "-c", command.format(model / name)], check=True)
        written.append(nbytes)

    with pytest.raises(CheckpointError) as caught:
        shardmerge.convert(model, model.parent / "out", options=api.Options(workers=1), progress=progress)
    assert caught.value.code in ("source-changed", "truncated-file")
    assert str(model / name) in caught.value.where
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_link_that_leads_elsewhere_for_a_while_is_refused(model: Path) -> None:
    """Before and after, the path leads to the planned file, which nobody touched. What counts is what was opened."""
    shard = model / "model-00002-of-00002.safetensors"
    for name, change in (("real", None), ("other", _overwrite)):
        shutil.copy2(shard, model / name)
        if change is not None:
            change(model / name)
    shard.unlink()
    shard.symlink_to("real")
    calls = iter([lambda: _lead(shard, "other"), *[lambda: None] * 3, lambda: _lead(shard, "real")])
    with pytest.raises(CheckpointError) as caught:
        shardmerge.convert(
            model,
            model.parent / "out",
            options=api.Options(workers=1, shard_size=9 * MIB),  # the second file is opened with the second shard
            progress=lambda nbytes: next(calls, lambda: None)(),
        )
    assert (caught.value.code, caught.value.where) == ("source-changed", str(shard))


def _lead(link: Path, to: str) -> None:
    link.unlink()
    link.symlink_to(to)


def test_what_is_copied_has_the_digest_of_the_plan(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system keeps no useful times, the bytes themselves are compared."""
    monkeypatch.setattr(pins, "_compare", lambda stamp, status: None)
    prepared = api.prepare_conversion(model)
    _overwrite(model / "tokenizer.json")
    with pytest.raises(CheckpointError) as caught:
        api.carry_out(prepared, model.parent / "out", api.Options())
    assert caught.value.code == "source-changed"


@pytest.mark.parametrize("change", CHANGES[:3])
def test_a_change_after_the_weights_were_written_is_refused(model: Path, change: Callable[[Path], None]) -> None:
    """Side files come last: what was looked at before counts no more."""
    plan = api.prepare_conversion(model).plan
    side = next(side for side in plan.side_files if side.name == "tokenizer.json")
    assert content(plan, side) == (model / "tokenizer.json").read_bytes()
    change(model / "tokenizer.json")
    with pytest.raises(CheckpointError) as caught:
        content(plan, side)
    assert caught.value.code == "source-changed"


def test_a_file_that_grew_since_the_directory_was_listed_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the first look at it; it would be copied as long as it was."""
    look = SideFiles.pinned

    def pinned(self: SideFiles, plan: Plan) -> Plan:
        _grow(model / "tokenizer.json")
        return look(self, plan)

    monkeypatch.setattr(SideFiles, "pinned", pinned)
    with pytest.raises(CheckpointError) as caught:
        api.prepare_conversion(model)
    assert caught.value.code == "source-changed"


def test_a_lazy_tensor_of_a_file_that_changed_is_refused(model: Path) -> None:
    checkpoint = shardmerge.open_checkpoint(model)
    _replace(model / FILES[0])
    with pytest.raises(CheckpointError) as caught:
        checkpoint["b"].numpy()
    assert caught.value.code == "source-changed"


@pytest.mark.parametrize(
    ("field", "kind"), [("inode", "ext4"), ("device", "nfs4"), ("inode", "fuse.sshfs"), ("device", "fuse")]
)
def test_the_number_of_an_inode_counts_where_it_is_kept(
    model: Path, field: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else equal: of another file on a disk, of the same one where a FUSE file system was asked anew."""
    monkeypatch.setattr(pins, "file_system", lambda path: kind)
    path = model / "tokenizer.json"
    stamp = FileStamp.of(str(path), path.stat())
    found = pins.Pins([replace(stamp, **{field: getattr(stamp, field) + 1})])
    with nullcontext() if "fuse" in kind else pytest.raises(CheckpointError):
        found.check()


# What the plan id knows.


def test_a_copy_elsewhere_gives_the_same_plan(model: Path, tmp_path: Path) -> None:
    """Other inodes, other times, another path."""
    copy = tmp_path / "copy"
    shutil.copytree(model, copy, copy_function=shutil.copyfile)
    assert api.prepare_conversion(copy).plan.id == api.prepare_conversion(model).plan.id


def test_another_tokenizer_of_the_same_size_is_another_plan(model: Path) -> None:
    before = api.prepare_conversion(model).plan.id
    _overwrite(model / "tokenizer.json")
    assert api.prepare_conversion(model).plan.id != before


def test_what_the_output_does_not_depend_on_may_change(model: Path) -> None:
    """A run that is still training writes its log into the directory."""
    (model / "trainer_log.jsonl").write_text("{}\n")
    prepared = api.prepare_conversion(model)
    _grow(model / "trainer_log.jsonl")
    api.carry_out(prepared, model.parent / "out", api.Options())
