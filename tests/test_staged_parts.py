"""What is checked of parts before they are published, one check at a time, in this process."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardmerge import api
from shardmerge.api import Options
from shardmerge.errors import (
    CheckpointError,
    OutputError,
    PublishedError,
    ResourceError,
    ShardmergeError,
    UnreadableError,
    UsageError,
    VerificationError,
)
from shardmerge.execute.engine import Outcome, Workshop
from shardmerge.execute.gather import Assembler
from shardmerge.execute.means import Means
from shardmerge.execute.pins import Pins
from shardmerge.execute.records import RecordCounts, RecordTables
from shardmerge.execute.worker import Worker
from shardmerge.plan.tasks import batches
from shardmerge.plan.value import Part, Plan
from shardmerge.publish import checks, finishing
from shardmerge.publish import staging as staging_module
from shardmerge.publish.closeness import Closeness
from shardmerge.publish.finishing import Goal
from shardmerge.publish.having_made import have_made
from shardmerge.publish.making import PartMaker, is_made, read_receipt, receipt_path
from shardmerge.publish.part_receipts import receipt_from, sealed, unfit
from shardmerge.publish.recorded import read_recorded
from shardmerge.publish.remaking import verify_sources
from shardmerge.publish.running import carry_out_share, finish_plan, make_some
from shardmerge.publish.selection import Selection
from shardmerge.publish.shares import Anything, Share, which
from shardmerge.publish.staging import Staging, is_gone, remove
from shardmerge.sources.checksums import read_records
from shardmerge.storage.writing import OutputFile
from tests.receipts import receipt_of

QUICK = Options(sync=False, workers=1)
MAPPING = """\
shardmerge: 1
sources: {m: model.safetensors}
output: {path: out, shard_size: 1KB}
tensors:
  "{rest...}": m:{rest...}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two parts of 80 KB."""
    rng = np.random.default_rng(0)
    save_file({f"w.{i}": rng.standard_normal(20_000, np.float32) for i in range(2)}, tmp_path / "model.safetensors")
    (tmp_path / "mapping.yaml").write_text(MAPPING)
    return api.plan(tmp_path / "mapping.yaml", QUICK)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def staging(plan: Plan, out: Path) -> Staging:
    """Both parts are made, and nothing is published."""
    assert make_some(plan.parts(), Share(0, 1), out, QUICK).missing == 0
    return Staging.of(out, plan.id, sync=False)


def first_file(plan: Plan, staging: Staging) -> Path:
    return staging.model / plan.parts()[0].shard.name


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_part_that_is_not_what_its_receipt_says(plan: Plan, out: Path, staging: Staging) -> None:
    flip_last(first_file(plan, staging))
    with pytest.raises(VerificationError) as raised:
        finish_plan(plan, out, QUICK)
    assert raised.value.code == "part-differs"
    assert raised.value.where == str(first_file(plan, staging))
    assert "without --part" in raised.value.hint
    assert not out.exists()
    api.run(out.parent / "mapping.yaml", out, QUICK)  # as the hint says
    assert out.is_dir()


@pytest.mark.parametrize("change", ["longer", "gone", "folder"])
def test_a_file_of_another_size_is_no_part(change: str, plan: Plan, staging: Staging) -> None:
    part, path = plan.parts()[0], first_file(plan, staging)
    receipt = read_receipt(staging, part)
    assert receipt is not None
    assert unfit(receipt, part.shard, path) == ""
    if change == "longer":
        with path.open("ab") as file:
            file.write(b"x")
    else:
        path.unlink()
    if change == "folder":
        path.mkdir()
    assert unfit(receipt, part.shard, path) == "the file is gone, or has another size"
    assert not is_made(staging, part)


def test_a_part_that_cannot_be_read_is_not_called_gone(
    plan: Plan, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, path = plan.parts()[0], first_file(plan, staging)
    receipt = read_receipt(staging, part)
    assert receipt is not None
    opened = os.open

    def refused(name: str, *given: Any) -> int:
        if name == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(name, *given)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UnreadableError, match="Permission denied"):
        unfit(receipt, part.shard, path)


def test_what_was_cloned_has_no_checksum_to_compare(plan: Plan, staging: Staging) -> None:
    part = plan.parts()[0]
    receipt = read_receipt(staging, part)
    assert receipt is not None
    cloned = replace(receipt, crc32=None)
    assert unfit(cloned, part.shard, first_file(plan, staging)) == ""
    assert unfit(receipt, part.shard, first_file(plan, staging), recheck=True) == ""
    found = unfit(cloned, part.shard, first_file(plan, staging), recheck=True)
    assert found == "some of it was cloned, and has no checksum"
    wrong = replace(receipt, crc32=(receipt.crc32 or 0) ^ 1)
    assert "checksum" in unfit(wrong, part.shard, first_file(plan, staging), recheck=True)
    other = replace(wrong, machine="another", synced=False)
    assert "checksum" in unfit(other, part.shard, first_file(plan, staging))


@pytest.mark.parametrize(
    "change",
    [
        {"sample": 5}, {"tensors": []}, {"tensors": ["x"]}, {"cloned": {"w.0": ["f"]}}, {"counts": [1, 2]},
        {"records": [[7, 0, 1, 2, 3, []]]}, {"began": "x"}, {"crc32": "x"}, {"part": 1}, {"plan": "x"},
        {"shardmerge": "0.0.9"}, None,
    ],
)  # fmt: skip
def test_a_receipt_that_says_nothing_is_none(change: dict[str, object] | None, plan: Plan, staging: Staging) -> None:
    part = plan.parts()[0]
    row = json.loads(receipt_path(staging, 0).read_text())
    assert (row["file"], row["nbytes"]) == (part.shard.name, part.shard.nbytes)
    assert receipt_from(json.dumps(row).encode(), part) == read_receipt(staging, part)
    del row["receipt_sha256"]
    assert receipt_from(json.dumps(row).encode(), part) is None  # without its digest it is none
    assert receipt_from(sealed(json.dumps(row).encode()), part) == read_receipt(staging, part)
    data = json.dumps({**row, **change} if change is not None else [row]).encode()
    assert receipt_from(sealed(data), part) is None


def test_parts_of_another_version_are_not_gone_on_with(plan: Plan, out: Path, staging: Staging) -> None:
    begun = staging.root / "begun.json"
    begun.write_text(json.dumps({**json.loads(begun.read_text()), "shardmerge": "0.0.9"}))
    with pytest.raises(OutputError) as raised:
        staging.begin(plan.files(), out)
    assert raised.value.code == "other-plan-staged"
    assert raised.value.found.startswith("made by shardmerge 0.0.9")


def test_what_never_began_is_in_nobodys_way(plan: Plan, out: Path) -> None:
    other = Staging.of(out, "f" * 64, sync=False)
    other.parts.mkdir(parents=True)
    Staging.of(out, plan.id, sync=False).begin(plan.files(), out)
    (other.parts / "00000.json").touch()
    with pytest.raises(OutputError, match="unfinished parts of another plan"):
        Staging.of(out, plan.id, sync=False).begin(plan.files(), out)


def test_a_model_that_nobody_has_is_missed(
    plan: Plan, out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "_LOOK", 0.001)
    shutil.rmtree(staging.model)
    with pytest.raises(OutputError) as raised:
        finish_plan(plan, out, QUICK)
    assert raised.value.code == "parts-missing"
    assert "without --part" in raised.value.hint


def test_a_claim_of_any_bytes_is_somebody_elses(staging: Staging) -> None:
    theirs, mine = staging.parts / "00000.0.claim", staging.parts / "00001.0.claim"
    theirs.write_bytes(b"\xff\xfe")
    mine.write_text(staging.who)
    staging.tidy()
    assert theirs.exists()
    assert not mine.exists()


def test_a_part_that_another_maker_is_about_to_publish_is_made(
    plan: Plan, out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one makes a part that another one made; meanwhile that one takes all of them away to publish them."""
    make = Workshop.make

    def make_and_lose(self: Workshop, *given: Any) -> Outcome:
        done = make(self, *given)
        staging.model.rename(staging.root / "ready-another")
        return done

    monkeypatch.setattr(Workshop, "make", make_and_lose)
    have_made(plan.parts()[:1], staging, out, QUICK, None)
    assert is_made(staging, plan.parts()[0])


def test_a_result_that_is_there_is_whole_whoever_stops_it_last(
    plan: Plan, out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes while the last thing is done, which then comes to its end."""
    result = finish_plan(plan, out, QUICK)
    settle = Goal.settle

    def slowly(self: Goal, *, sync: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        settle(self, sync=sync)

    monkeypatch.setattr(Goal, "settle", slowly)
    assert carry_out_share(plan, Share(0, 1), out, QUICK).path == result.path


def test_what_was_done_is_counted(plan: Plan, out: Path, staging: Staging) -> None:
    result = finish_plan(plan, out, QUICK, made=2)
    assert result.outcome.bytes_read == result.outcome.bytes_written == 2 * 80_000
    assert result.made == 2
    again = finish_plan(plan, out, QUICK)
    assert again.outcome.bytes_written == again.made == 0
    assert again.records == RecordCounts(0, 0, 0, 0)


def test_without_an_exchange_the_old_result_is_put_aside(
    plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system without renameat2."""
    monkeypatch.setattr(finishing, "exchange", lambda *paths: False)
    api.run(out.parent / "mapping.yaml", out, replace(QUICK, format="bin"))
    api.run(out.parent / "mapping.yaml", out, replace(QUICK, overwrite=True))
    assert not list(out.glob("*.bin"))
    assert len(list(out.glob("*.safetensors"))) == 2
    assert [path.name for path in out.parent.glob("out*")] == ["out"]


def test_there_is_room_for_what_is_beside_the_files(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 16 << 20
    monkeypatch.setattr(checks, "free_bytes", lambda path: free + 99)
    checks.check_output((), out, 99, overwrite=False)
    with pytest.raises(ResourceError) as raised:
        checks.check_output((), out, 100, overwrite=False)
    assert raised.value.code == "disk-too-small"
    assert raised.value.where == str(out.parent)
    assert raised.value.hint
    answers = iter([False, True])
    monkeypatch.setattr(os, "access", lambda path, mode: next(answers))
    checks.check_output((), out, 99, overwrite=False)  # an error that passed
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError) as refused:
        checks.check_output((), out, 99, overwrite=False)
    assert (refused.value.code, refused.value.where) == ("unwritable-output", str(out.parent))
    assert refused.value.hint


def test_a_removed_staging_directory_gives_back_what_was_put_aside(out: Path, staging: Staging) -> None:
    old = staging.root / "old-another"
    old.mkdir()
    (old / "kept").write_text("as it was")
    remove(staging.root, out)
    assert (out / "kept").read_text() == "as it was"
    assert [path.name for path in out.parent.glob("out*")] == ["out"]


def test_a_file_that_is_not_planned_is_not_published(plan: Plan, out: Path, staging: Staging) -> None:
    (staging.model / "more.safetensors").write_bytes(b"")
    with pytest.raises(VerificationError) as raised:
        finish_plan(plan, out, QUICK)
    assert raised.value.code == "part-differs"
    assert raised.value.where == str(staging.model / "more.safetensors")
    assert raised.value.hint == "start again with --fresh"
    assert not out.exists()


def test_what_came_to_the_output_path_meanwhile_stays(plan: Plan, out: Path, staging: Staging) -> None:
    out.mkdir()
    (out / "theirs").touch()
    with pytest.raises(OutputError) as raised:
        finish_plan(plan, out, replace(QUICK, overwrite=True))
    assert raised.value.code == "not-ours"
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert staging.model.is_dir()


@pytest.mark.parametrize("change", ["shorter", "gone", "receipt"])
def test_a_result_that_was_cut_off_is_not_there(change: str, plan: Plan, out: Path, staging: Staging) -> None:
    goal = Goal.of(plan, out)
    assert not goal.reached()
    finish_plan(plan, out, QUICK)
    assert goal.reached()
    assert not Goal.of(plan, out, fresh=True).reached()
    path = out / plan.parts()[1].shard.name
    if change == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    else:
        (path if change == "gone" else out / "shardmerge.json").unlink()
    assert not goal.reached()


def test_verify_names_what_is_longer(plan: Plan, out: Path, staging: Staging) -> None:
    finish_plan(plan, out, QUICK)
    path = out / plan.parts()[1].shard.name
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(VerificationError) as raised:
        api.verify(out)
    assert (raised.value.code, raised.value.where) == ("size-differs", str(path))


def test_verify_makes_every_tensor_again(
    plan: Plan, out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_plan(plan, out, QUICK)
    seen, given_back = list[int](), list[int]()
    release = Assembler.release
    monkeypatch.setattr(Assembler, "release", lambda self, data: given_back.append(len(data)) or release(self, data))
    verdict = verify_sources(out, plan, 1 << 14, seen.append)
    assert given_back == seen
    assert (verdict.tensors, verdict.nbytes, sum(seen)) == (2, 160_000, 160_000)
    other = api.plan(out.parent / "mapping.yaml", replace(QUICK, format="bin"))
    with pytest.raises(VerificationError) as raised:
        verify_sources(out, other, 1 << 14)
    assert (raised.value.code, raised.value.where) == ("plan-differs", str(out))
    assert (raised.value.found, raised.value.expected) == (other.id[:16], plan.id[:16])
    assert "convert again" in raised.value.hint
    path = out / plan.parts()[0].shard.name
    flip_last(path)
    with pytest.raises(VerificationError) as raised:
        verify_sources(out, plan, 1 << 14)
    end = path.stat().st_size
    assert raised.value.code == "tensor-differs"
    assert raised.value.where == f"{path}, bytes {end - 80_000 % (1 << 14)} to {end}"
    os.truncate(path, end - 1)
    with pytest.raises(VerificationError) as raised:
        verify_sources(out, plan, 1 << 14)
    assert (raised.value.code, raised.value.where) == ("size-differs", str(path))


@pytest.mark.parametrize("given", [{"rtol": 0.1}, {"atol": 0.1}, {"cast": "bfloat16"}])
def test_headers_have_no_values_to_be_close(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        Closeness(headers=True, **given)
    assert raised.value.code == "no-effect"
    assert raised.value.hint
    for number in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError) as raised:
            Closeness(atol=0.0, rtol=number)
        assert raised.value.code == "bad-tolerance"


@pytest.mark.parametrize(
    ("sample", "of_ten"), [("1", 1), ("3", 3), ("99", 10), ("100%", 10), ("5%", 1), ("25%", 3), ("0.1%", 1)]
)
def test_how_many_a_sample_has(sample: str, of_ten: int, plan: Plan, out: Path, staging: Staging) -> None:
    finish_plan(plan, out, QUICK)
    receipt = read_recorded(out)
    one = receipt.tensors["w.0"]
    ten = replace(receipt, tensors={f"t.{n}": one for n in range(10)})
    drawn = Selection(sample=sample)
    assert drawn
    assert len(drawn.of(ten, out).tensors) == of_ten
    assert drawn.of(ten, out) == Selection(sample=sample, seed=0).of(ten, out)
    assert not Selection()
    assert Selection().of(ten, out) is ten


@pytest.mark.parametrize("sample", ["0", "0%", "100.1%", "-1", "x", "5 %"])
def test_a_sample_is_a_number_or_a_share(sample: str) -> None:
    with pytest.raises(UsageError) as raised:
        Selection(sample=sample)
    assert (raised.value.code, raised.value.found) == ("bad-sample", sample)


def test_the_worst_difference_is_the_first(tmp_path: Path) -> None:
    """Values by their largest difference, also where the types differ too; what one side lacks is before them."""
    ones = np.ones(4, np.float32)
    save_file({"small": ones, "large": ones, "lacking": ones, "same": ones}, tmp_path / "a.safetensors")
    other = {"small": (ones + 1).astype(np.float64), "large": ones + 100, "same": ones}
    save_file(other, tmp_path / "b.safetensors")
    found = api.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    counts = {"equal": 1, "within tolerance": 0, "equal after a cast": 0, "differ": 2, "only in A": 1, "only in B": 0}
    assert found.counts == counts
    assert [(one.name, one.what) for one in found] == [
        ("lacking", "only in A"), ("large", "values"), ("small", "dtype"), ("small", "values"),
    ]  # fmt: skip


def test_any_part_tells_that_it_waits() -> None:
    def tell(missing: int) -> None:
        """Nobody waits here."""

    found = which("any", tell)
    assert isinstance(found, Anything)
    assert found.waiting is tell
    assert which("3/8", environment={}) == Share(3, 8)
    assert which("3/8", environment={"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1"}) == Share(2, 8)
    for text in ("8/8", "x", "1/8/2", "-1/8"):
        with pytest.raises(UsageError) as raised:
            which(text, environment={})
        assert (raised.value.code, raised.value.found) == ("bad-part", text)
        assert raised.value.hint


@pytest.mark.parametrize("failures", [2, 5])
def test_removing_is_tried_again_a_while_later(
    failures: int, out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that was under way may put a file into a directory that was emptied; five times, then it is an error."""
    rmdir, left, waited = Path.rmdir, [errno.ENOTEMPTY] * failures, list[float]()

    def fails(self: Path) -> None:
        if left and ".partial-gone" in self.name:
            raise OSError(left.pop(), "not empty")
        rmdir(self)

    monkeypatch.setattr(Path, "rmdir", fails)
    monkeypatch.setattr(time, "sleep", waited.append)
    remove(staging.root, out)
    assert waited == [0.1] * failures
    assert not list(out.parent.glob("out.partial-*"))


def test_what_cannot_be_removed_is_an_error(out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def refused(self: Path, **more: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OutputError) as raised:
        remove(staging.root, out)
    assert raised.value.code == "unwritable-output"


@pytest.mark.parametrize(("form", "read"), [("safetensors", True), ("bin", False)])
def test_who_read_a_selected_tensor_is_told(form: str, read: bool, plan: Plan, out: Path) -> None:
    api.run(out.parent / "mapping.yaml", out, replace(QUICK, format=form))
    checks = api.verify(out, tensors=["w.0"]).checks
    assert ("safetensors reads the same tensors" in checks) == read
    assert "1 tensors have the receipt's names, types, shapes and places" in checks
    assert "80,000 bytes have the receipt's checksums" in checks


def test_of_equal_distances_the_wider_is_the_first(tmp_path: Path) -> None:
    ones = np.ones(4, np.float32)
    save_file({"few": ones, "many": ones, "near": ones}, tmp_path / "a.safetensors")
    other = {"few": ones + np.eye(4, dtype=np.float32)[0], "many": ones + 1, "near": ones * 1.001}
    save_file(other, tmp_path / "b.safetensors")
    found = api.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", how=Closeness(rtol=0.01))
    assert [one.name for one in found] == ["many", "few"]
    assert (found.close, found.counts["within tolerance"], found.equal) == (1, 1, 0)


def test_a_side_that_changes_while_it_is_compared_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": np.ones(4, np.float32)}, tmp_path / f"{name}.safetensors")
    sides = api.sides(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Closeness())
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(ShardmergeError) as raised:
        sides.compare()
    assert raised.value.code == "source-changed"


@pytest.mark.parametrize("how", ["settle", "system", "sync"])
def test_what_fails_after_publishing_is_told(
    how: str, plan: Plan, out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> None:
        if how == "system":
            raise PermissionError(errno.EPERM, "not permitted")
        raise OutputError("unwritable-output", "cannot write: it is so", where="the place")

    monkeypatch.setattr(finishing, "sync_directory" if how == "sync" else "remove", fails)
    with pytest.raises(PublishedError) as raised:
        Goal.of(plan, out).settle(sync=True)
    assert raised.value.code == ("durability-unconfirmed" if how == "sync" else "not-tidied")
    assert raised.value.where == str({"settle": "the place", "system": staging.root, "sync": out}[how])
    assert raised.value.found == ("not permitted" if how == "system" else "cannot write: it is so")
    assert raised.value.hint


def test_what_is_left_beside_a_result_is_removed_by_the_next_run(plan: Plan, out: Path, staging: Staging) -> None:
    finish_plan(plan, out, QUICK)
    staging.parts.mkdir(parents=True)
    finish_plan(plan, out, QUICK)
    assert [path.name for path in out.parent.glob("out*")] == ["out"]


def test_a_maker_elsewhere_is_another_one(plan: Plan, staging: Staging) -> None:
    means = Means(1, 1 << 20, "pread", bounded=False, sync=False, device="cpu", records=read_records)
    maker = PartMaker(staging, means)
    copy = pickle.loads(pickle.dumps(maker))
    assert copy == maker
    assert copy.staging.who != staging.who


def test_a_part_that_fails_leaves_no_file(
    plan: Plan, out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Workshop, part: Part, path: Path, *given: object) -> None:
        path.write_bytes(b"half of it")
        raise CheckpointError("source-changed", "it changed", where="there")

    monkeypatch.setattr(Workshop, "make", fails)
    with pytest.raises(CheckpointError):
        have_made(plan.parts()[:1], staging, out, QUICK, None)
    assert {path.suffix for path in staging.parts.iterdir()} == {".json"}


def test_a_directory_gets_another_name_before_it_is_removed(
    out: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(staging_module, "_delete", seen.append)
    remove(staging.root, out)
    assert not staging.root.exists()
    assert is_gone(seen[0])
    remove(seen[0], out)  # by somebody else, who finds it so
    assert seen == [seen[0]] * 2
    assert staging_module.stagings(out.parent / "none" / "out") == []


def test_what_a_receipt_holds(plan: Plan, out: Path, staging: Staging) -> None:
    finish_plan(plan, out, QUICK)
    receipt = receipt_of(out)
    assert receipt["sources"]["m"].keys() == {"path", "kind", "fingerprint", "notes"}
    assert receipt.keys() == {
        "format", "schema", "sha256", "shardmerge", "plan", "target", "total_size", "cloned", "sources", "warnings",
        "shards", "side_files", "tensors", "unused", "digests",
    }  # fmt: skip


def test_who_is_to_stop_stops_with_the_tile(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not whole is not summed."""
    part = plan.parts()[0]
    worker = Worker(Means(tile=1 << 14, sync=False), Pins(part.files), RecordTables(read_records))
    file = OutputFile(tmp_path / "file", part.shard.nbytes, sync=False)
    (batch,) = batches(part.shard, 1 << 14)
    seen, forgotten = list[int](), list[Assembler]()

    def forget(self: Assembler) -> None:
        forgotten.append(self)

    monkeypatch.setattr(Assembler, "forget", forget)
    assert not worker.carry(batch, file, seen.append)
    assert (seen, worker.sums, worker.written) == ([1 << 14], [], 0)
    assert worker.carry(batch, file, lambda nbytes: True)
    assert [one[0] for one in worker.sums] == ["w.0"]
    assert worker.written == 80_000
    assert forgotten == [worker.assembler] * 2  # states of ops go with each batch
    file.abandon()
