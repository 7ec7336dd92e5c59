"""An input never changes unseen: between the plan and the run, in the middle of a run, by descriptor and by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import shardmerge
from shardmerge import api
from shardmerge.errors import CheckpointError, OutputError, ShardmergeError, UnreadableError
from shardmerge.execute import pins
from shardmerge.plan.value import Plan
from shardmerge.prepare.side_files import SideFiles, content
from shardmerge.publish.remaking import verify_sources
from shardmerge.publish.results import Result
from shardmerge.publish.staging import Staging
from shardmerge.sources import hf_folder
from shardmerge.sources.torch_checkpoint import read_torch_checkpoint
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.storage.writing import OutputFile
from shardmerge.tensors import Extent, FileStamp
from tests import mutations
from tests.staged import assert_nothing_done, assert_well_left, files, stagings

MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of 8 and 4 MiB, that are read one after the other, a config and a tokenizer."""
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


CHANGES = [mutations.append, mutations.forge, mutations.replace, mutations.delete]
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
    assert_nothing_done(model.parent / "out")


def test_a_change_after_the_plan_is_refused_before_a_part_is_made(model: Path) -> None:
    """Of a file that is read hours later, for the second part."""
    options = api.Options(workers=1, shard_size=9 * MIB)
    prepared = api.prepare_conversion(model, options=options)
    assert len(prepared.plan.shards) == 2
    mutations.forge(model / FILES[0])
    with pytest.raises(CheckpointError) as caught:
        api.carry_out(prepared, model.parent / "out", options)
    assert caught.value.code == "source-changed"
    assert_nothing_done(model.parent / "out")


def test_what_a_result_is_verified_with_is_what_was_planned(model: Path) -> None:
    """That a source changed says more than that a tensor differs; and it might not differ."""
    shardmerge.convert(model, model.parent / "out")
    plan = api.prepare_conversion(model).plan
    mutations.forge(model / FILES[0])
    with pytest.raises(CheckpointError) as caught:
        verify_sources(model.parent / "out", plan, MIB)
    assert caught.value.code == "source-changed"


# --- while headers are read, before there is a plan


@contextmanager
def at_opening(name: str, do: Callable[[], object]) -> Iterator[None]:
    """Does something once, after a file of that name was opened."""
    looked_at, left = SourceFile._looked_at, [do]

    def opened(self: SourceFile) -> os.stat_result:
        status = looked_at(self)
        if Path(self.path).name == name and left:
            left.pop()()
        return status

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceFile, "_looked_at", opened)
        yield
    assert not left


@pytest.mark.parametrize("change", [*CHANGES, mutations.truncate, mutations.overwrite])
def test_an_error_of_a_file_that_changed_says_so(change: Callable[[Path], None], tmp_path: Path) -> None:
    """Whatever the error: a reader that meets half of the old bytes and half of the new ones blames the file."""
    path = tmp_path / "file"
    path.write_bytes(b"1234" * 100)
    with pytest.raises(CheckpointError) as caught:
        _fail(path, ValueError(), change)
    assert (caught.value.code, caught.value.where) == ("source-changed", str(path))
    assert type(caught.value.__cause__) is ValueError


def test_an_error_of_a_file_that_did_not_change_is_that(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    with pytest.raises(ValueError, match="of the file"):
        _fail(path, ValueError("of the file"), Path.stat)
    with pytest.raises(KeyboardInterrupt):
        _fail(path, KeyboardInterrupt(), mutations.append)
    with SourceFile(path):  # without an error there is nothing to explain, and a plan compares
        mutations.append(path)


def _fail(path: Path, error: BaseException, change: Callable[[Path], object]) -> None:
    with SourceFile(path):
        change(path)
        raise error


def test_a_zip_that_is_cut_short_under_its_reader_is_no_damaged_zip(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(4)}, path)
    with at_opening(path.name, lambda: mutations.truncate(path)), pytest.raises(CheckpointError) as caught:
        read_torch_checkpoint(path)
    assert (caught.value.code, caught.value.where) == ("source-changed", str(path))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_goes_before_it_is_read_is_a_refused_source(model: Path, name: str) -> None:
    """It was listed, and is gone when its turn comes: no wrong usage, and no trouble of the system."""
    shutil.copy2(model / name, model.parent)
    before = "config.json" if name.startswith("tokenizer") else "model-00001-of-00002.safetensors"
    with at_opening(before, (model / name).unlink), pytest.raises(UnreadableError) as caught:
        api.prepare_conversion(model)
    assert (caught.value.code, caught.value.where) == ("missing-file", str(model / name))
    assert (caught.value.exit_code, caught.value.hint[-9:]) == (1, "run again")
    shutil.copy2(model.parent / name, model / name)  # whoever wrote there is done
    assert api.prepare_conversion(model).plan.shards


def test_a_side_file_that_goes_while_it_is_looked_for_is_not_there(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file = Path.is_file

    def goes(self: Path) -> bool:
        found = is_file(self)
        if self.name == "tokenizer.json" and found:
            self.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", goes)
    assert {side.name for side in api.prepare_conversion(model).plan.side_files} >= {"config.json"}
    assert not (model / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", mutations.truncate),
        ("tokenizer.json", mutations.truncate),
        ("tokenizer.json", mutations.append),
    ],
)
def test_a_side_file_of_another_size_than_it_was_listed_with_changed(
    model: Path, name: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is read and rewritten, and one that is copied."""
    listed = hf_folder.side_files

    def then_changed(folder: Path) -> dict[str, Extent]:
        found = listed(folder)
        change(folder / name)
        return found

    for module in [module for module in sys.modules.values() if getattr(module, "side_files", None) is listed]:
        monkeypatch.setattr(module, "side_files", then_changed)
    with pytest.raises(CheckpointError) as caught:
        api.prepare_conversion(model, options=api.Options(dtype="bfloat16"))
    assert (caught.value.code, caught.value.where) == ("source-changed", str(model / name))


@pytest.mark.parametrize("change", CHANGES)
def test_a_side_file_is_read_twice_as_the_same_file(model: Path, change: Callable[[Path], None]) -> None:
    """For its class and for its tokens, and in pieces where something is put between them."""
    path, sides = model / "config.json", SideFiles()
    whole = Extent(str(path), 0, path.stat().st_size)
    assert sides.read(whole.slice(0, 1)) == b"{"
    text = sides.read(whole)
    assert sides.read(whole.slice(0, 9)) + sides.read(whole.slice(9, whole.nbytes - 9)) == text == path.read_bytes()
    change(path)
    with pytest.raises(CheckpointError) as caught:
        sides.read(whole)
    assert caught.value.code == ("missing-file" if change is mutations.delete else "source-changed")


COMMANDS = {
    "grown": "printf x >> {0}",
    "overwritten": "touch -r {0} $0; printf '!!!!' | dd of={0} conv=notrunc bs=1 seek=50 2>&-; touch -r $0 {0}",
    "replaced": "cp -p {0} {0}.t; mv {0}.t {0}",
    "truncated": "truncate -s 40 {0}",
    "gone": "rm {0}",
}


@contextmanager
def at_write(number: int, do: Callable[[], object]) -> Iterator[None]:
    """Does something before that write of a run, from 0: the header of its first file, then a tile each."""
    write, numbers = OutputFile.write, count()

    def written(self: OutputFile, offset: int, data: memoryview) -> None:
        if next(numbers) == number:
            do()
        write(self, offset, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFile, "write", written)
        yield


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", *FILES])
@pytest.mark.parametrize("kind", COMMANDS)
def test_a_change_in_the_middle_of_a_run_is_refused(model: Path, name: str, kind: str) -> None:
    """By a process of its own, when the first tile is written: of the weights some were read, others not yet."""
    command = ["sh", "-c", COMMANDS[kind].format(model / name), str(model.parent / "times")]
    with at_write(1, lambda: subprocess.run(command, check=True)), pytest.raises(CheckpointError) as caught:
        shardmerge.convert(model, model.parent / "out", options=api.Options(workers=1))
    assert (caught.value.code, caught.value.where) == ("source-changed", str(model / name))
    if name != "tokenizer.json":
        assert_nothing_done(model.parent / "out")
        return
    assert_well_left(model.parent / "out")
    if kind == "replaced":  # by the same bytes
        assert shardmerge.convert(model, model.parent / "out").made == 0
        return
    with pytest.raises(OutputError) as refused:  # it is another plan now, and what was made is not mixed with it
        shardmerge.convert(model, model.parent / "out")
    assert (refused.value.code, refused.value.found.split(":")[0]) == ("other-plan-staged", SAID[kind])
    shardmerge.convert(model, model.parent / "out", options=api.Options(fresh=True))
    found = files(model.parent / "out")
    assert found.get("tokenizer.json") == files(model).get("tokenizer.json")
    assert stagings(model.parent / "out") == []


SAID = {
    "grown": "a source changed since",
    "overwritten": "the mapping, its options or a small file beside the weights are not the same",
    "truncated": "a source changed since",
    "gone": "other source files",
}


@pytest.mark.parametrize("kind", ["grown", "overwritten", "replaced"])
def test_what_was_read_for_the_last_part_may_change(model: Path, kind: str, tmp_path: Path) -> None:
    """A part was compared with its sources when it was made. The result is what they were then."""
    shardmerge.convert(model, tmp_path / "before")
    command = ["sh", "-c", COMMANDS[kind].format(model / FILES[0]), str(tmp_path / "times")]
    place = Staging.place

    def changed_then_placed(self: Staging, path: Path, data: bytes | list[bytes]) -> None:
        if path.name == "00000.json":  # the receipt of the only part
            subprocess.run(command, check=True)
        place(self, path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "place", changed_then_placed)
        shardmerge.convert(model, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "before")


def test_a_link_that_leads_elsewhere_for_a_while_is_refused(model: Path) -> None:
    """Before and after, the path leads to the planned file, which nobody touched. What counts is what was opened."""
    shard = model / "model-00002-of-00002.safetensors"
    for name, change in (("real", None), ("other", mutations.forge)):
        shutil.copy2(shard, model / name)
        if change is not None:
            change(model / name)
    shard.unlink()
    shard.symlink_to("real")
    options = api.Options(workers=1, shard_size=9 * MIB)  # the second file is opened with the second shard
    there, back = at_write(2, lambda: _lead(shard, "other")), at_write(6, lambda: _lead(shard, "real"))
    with there, back, pytest.raises(CheckpointError) as caught:
        shardmerge.convert(model, model.parent / "out", options=options)
    assert (caught.value.code, caught.value.where) == ("source-changed", str(shard))


def _lead(link: Path, to: str) -> None:
    link.unlink()
    link.symlink_to(to)


def test_a_file_that_was_refused_is_refused_again(model: Path) -> None:
    """By whichever thread asks next: it is not kept open as if it were the right one."""
    path = model / FILES[0]
    pool = FilePool()
    pool.opened = pins.Pins([FileStamp.of(str(path), path.stat())]).opened
    mutations.forge(path)
    for _ in range(2):
        with pytest.raises(CheckpointError):
            pool.get(str(path))


def test_what_is_copied_has_the_digest_of_the_plan(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system keeps no useful times, the bytes themselves are compared."""
    monkeypatch.setattr(pins, "_compare", lambda stamp, status: None)
    prepared = api.prepare_conversion(model)
    mutations.forge(model / "tokenizer.json")
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
        mutations.append(model / "tokenizer.json")
        return look(self, plan)

    monkeypatch.setattr(SideFiles, "pinned", pinned)
    with pytest.raises(CheckpointError) as caught:
        api.prepare_conversion(model)
    assert caught.value.code == "source-changed"


def test_a_lazy_tensor_of_a_file_that_changed_is_refused(model: Path) -> None:
    checkpoint = shardmerge.open_checkpoint(model)
    mutations.replace(model / FILES[0])
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


# A plan that was written down: its stamps have no inode and no time of change.


@pytest.fixture
def written(model: Path) -> Path:
    """The plan of a mapping that makes two parts."""
    mapping, path = model.parent / "mapping.yaml", model.parent / "plan.json"
    head = "shardmerge: 1\nsources: {m: model}\noutput: {path: out, shard_size: 9MB}\n"
    mapping.write_text(head + 'tensors: {"{rest...}": "m:{rest...}"}\n')
    api.write_plan(api.prepare(mapping, api.Options()), path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "torch", "legacy"])
def test_another_header_under_the_size_and_time_of_the_plan(form: str, model: Path, tmp_path: Path) -> None:
    """Its tensors may be elsewhere in the file."""
    source, plan = model / FILES[0], tmp_path / "plan.json"
    if form != "safetensors":
        source = tmp_path / "model.bin"
        torch.save({"aaaa": torch.ones(9)}, source, _use_new_zipfile_serialization=form == "torch")
    api.write_plan(api.prepare_conversion(source), plan, tmp_path / "out")
    before, data = source.stat(), source.read_bytes()
    name = b'"b"' if form == "safetensors" else b"aaaa"
    assert data.count(name) == 1
    source.write_bytes(data.replace(name, name.translate(bytes.maketrans(b"ab", b"zz"))))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError) as caught:
        shardmerge.run(plan)
    assert (caught.value.code, caught.value.where) == ("source-changed", str(source))
    assert "another header" in caught.value.found


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_time_put_back_in_the_middle_of_a_run_hides_nothing(model: Path, written: Path, at: int) -> None:
    """Before the file is opened, and after: the first look, before anything is read, is at all of them."""
    with at_write(at, lambda: mutations.forge(model / FILES[0])), pytest.raises(CheckpointError) as caught:
        shardmerge.run(written, options=api.Options(workers=1))
    assert (caught.value.code, caught.value.where) == ("source-changed", str(model / FILES[0]))


def test_a_time_put_back_between_two_processes_shows_when_the_result_is_verified(model: Path, written: Path) -> None:
    """Between commands a source is known by size, time and header. Its data is compared by ``verify --sources``."""
    api.run_part(written, "0/2")
    mutations.forge(model / "model-00001-of-00002.safetensors")
    result = api.run_part(written, "1/2")
    assert isinstance(result, Result)
    shardmerge.verify(result.path)
    with pytest.raises(ShardmergeError) as caught:
        shardmerge.verify(result.path, sources=written.with_name("mapping.yaml"))
    assert {(error.code, error.what.split()[0]) for error in caught.value.each()} == {("tensor-differs", "a")}


# What the plan id knows.


def test_a_copy_elsewhere_gives_the_same_plan(model: Path, tmp_path: Path) -> None:
    """Other inodes, another path: what was modified at the same time is the same file."""
    copy = shutil.copytree(model, tmp_path / "copy")
    assert api.prepare_conversion(copy).plan.id == api.prepare_conversion(model).plan.id


@pytest.mark.parametrize(("name", "other"), [(FILES[0], True), ("tokenizer.json", False)])
def test_weights_of_another_time_are_another_plan(model: Path, name: str, other: bool) -> None:
    """Nobody read their data. Small files are known by their bytes, whenever they were written."""
    before = api.prepare_conversion(model).plan.id
    os.utime(model / name, ns=(0, 0))
    assert (api.prepare_conversion(model).plan.id != before) == other


def test_two_files_that_look_alike_are_told_apart(model: Path) -> None:
    """The same size, header and time of modification, and other values: which tensor is of which counts."""
    first = model / FILES[0]
    for name in ("one", "two"):
        shutil.copy2(first, model.parent / f"{name}.safetensors")
    ids = set()
    for left, right in (("one", "two"), ("two", "one")):
        text = f"shardmerge: 1\nsources: {{a: {left}.safetensors, b: {right}.safetensors}}\ntensors:\n"
        (model.parent / "mapping.yaml").write_text(text + "  x: a:b\n  y: b:b\n")
        ids.add(shardmerge.plan(model.parent / "mapping.yaml").id)
    assert len(ids) == 2


def test_another_tokenizer_of_the_same_size_is_another_plan(model: Path) -> None:
    before = api.prepare_conversion(model).plan.id
    mutations.forge(model / "tokenizer.json")
    assert api.prepare_conversion(model).plan.id != before


def test_what_the_output_does_not_depend_on_may_change(model: Path) -> None:
    """A run that is still training writes its log into the directory."""
    (model / "trainer_log.jsonl").write_text("{}\n")
    prepared = api.prepare_conversion(model)
    mutations.append(model / "trainer_log.jsonl")
    api.carry_out(prepared, model.parent / "out", api.Options())
