"""Several processes make one plan: fixed shares, whatever is left, who publishes, and the script for Slurm."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardmerge import api
from shardmerge.api import Options, Result, Unfinished
from shardmerge.errors import OutputError, ShardmergeError, UsageError
from shardmerge.plan.value import Part
from shardmerge.publish.finishing import _life
from shardmerge.publish.having_made import await_receipts
from shardmerge.publish.making import PartMaker, is_made
from shardmerge.publish.running import carry_out_share
from shardmerge.publish.shares import Anything, PartClaims, Share, which
from shardmerge.publish.staging import Staging, remove
from tests.conftest import shardmerge

QUICK = Options(sync=False, workers=1)
# Parts of unequal sizes, in KiB.
SIZES = (700, 90, 400, 1300, 20, 300, 310)
MAPPING = """\
shardmerge: 1
sources: {m: model.safetensors}
output: {path: out, dtype: bfloat16, shard_size: 1KB}
tensors:
  "{rest...}": m:{rest...}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mapping with a part a tensor, and what one run makes of it. The name of its folder is hard on a shell."""
    folder = tmp_path_factory.mktemp("model") / "it's $HOME"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {f"w.{i}": rng.standard_normal(kib << 8, np.float32) for i, kib in enumerate(SIZES)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "mapping.yaml").write_text(MAPPING)
    api.run(folder / "mapping.yaml", folder / "whole", QUICK)
    return folder


def task(model: Path, out: Path, part: str) -> Result | Unfinished:
    return api.run_part(model / "mapping.yaml", part, out, QUICK)


def anything(model: Path, out: Path, which: Anything) -> Result | Unfinished:
    return carry_out_share(api.plan(model / "mapping.yaml", QUICK), which, out, QUICK)


def staging_of(model: Path, out: Path) -> Staging:
    """Begun, as another process would."""
    plan = api.plan(model / "mapping.yaml", QUICK)
    staging = Staging.of(out, plan.id, sync=False)
    staging.begin(plan.files(), out)
    return staging


def check(model: Path, out: Path) -> None:
    """The bytes of one run, and nothing is left over."""
    whole = model / "whole"
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes() or path.name == "shardmerge.json"
    assert not list(out.parent.glob("*.partial-*"))


# --- fixed shares ---


@pytest.mark.parametrize("count", range(1, 17))
def test_any_number_of_shares_in_any_order(model: Path, tmp_path: Path, count: int) -> None:
    order = random.Random(count).sample(range(count), count)
    states = [task(model, tmp_path / "out", f"{index}/{count}") for index in order]
    assert sum(state.made for state in states) == len(SIZES)
    assert isinstance(states[-1], Result) or order[-1] >= len(SIZES)
    check(model, tmp_path / "out")


def test_a_share_again_makes_nothing_again(model: Path, tmp_path: Path) -> None:
    first, again = (task(model, tmp_path / "out", "0/2") for _ in range(2))
    assert isinstance(first, Unfinished)
    assert again == Unfinished(0, first.missing, len(SIZES))
    assert first.made + first.missing == len(SIZES)


def test_finish_says_what_is_missing_and_then_publishes(model: Path, tmp_path: Path) -> None:
    mapping, out = model / "mapping.yaml", tmp_path / "out"
    task(model, out, "0/2")
    with pytest.raises(OutputError) as found:
        api.finish(mapping, out, QUICK)
    assert found.value.code == "parts-missing"
    assert not out.exists()
    task(model, out, "1/2")
    check(model, out)
    assert api.finish(mapping, out, QUICK).made == 0  # published already


@pytest.mark.parametrize(
    ("text", "environment", "share"),
    [
        ("0/4", {}, Share(0, 4)),
        ("3/4", {}, Share(3, 4)),
        ("1/3", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1"}, Share(0, 3)),
        ("3/3", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1"}, Share(2, 3)),
        ("2/3", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0"}, Share(2, 3)),  # another number than Slurm's
    ],
)
def test_shares_count_from_the_first_task_of_an_array(text: str, environment: dict[str, str], share: Share) -> None:
    assert which(text, environment=environment) == share


@pytest.mark.parametrize("text", ["4/4", "0/0", "-1/4", "1", "all", "1/2/3", "", "/", "1 / 2"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UsageError) as found:
        which(text, environment={})
    assert found.value.code == "bad-part"


def test_fresh_and_part_do_not_go_together(model: Path, tmp_path: Path) -> None:
    done = shardmerge("run", model / "mapping.yaml", "--out", tmp_path / "out", "--part", "any", "--fresh", code=2)
    assert "[no-effect]" in done.stderr


# --- whatever is left ---


def test_several_at_once_make_each_part_once_and_one_publishes(model: Path, tmp_path: Path) -> None:
    for turn in range(4):
        out = tmp_path / f"out{turn}"
        with ThreadPoolExecutor(4) as pool:
            states = list(pool.map(lambda _: anything(model, out, Anything(look=(0.3, 0.5))), range(4)))  # noqa: B023
        assert sum(state.made for state in states) == len(SIZES)
        assert all(isinstance(state, Result) for state in states)
        check(model, out)


def test_a_claim_is_given_once(model: Path, tmp_path: Path) -> None:
    """Four are let go at the same time, for a claim that is new, and for one that follows an old one."""
    stagings = [staging_of(model, tmp_path / "out") for _ in range(4)]
    for age in (0, 100):
        for number in range(30):
            name = f"{number:05d}"
            for path in stagings[0].parts.glob(f"{name}.*"):
                os.utime(path, (time.time() - age,) * 2)
            gate = threading.Barrier(4)

            def take(staging: Staging, gate: threading.Barrier = gate, name: str = name) -> bool:
                gate.wait()
                return PartClaims(staging, gone=50).take(name)

            with ThreadPoolExecutor(4) as pool:
                assert sum(pool.map(take, stagings)) == 1


def test_parts_that_another_is_at_work_on_are_waited_for(model: Path, tmp_path: Path) -> None:
    """Four of seven: too many to know what is usual, and who is slow."""
    out, waits = tmp_path / "out", list[int]()
    other = staging_of(model, out)
    assert all(PartClaims(other).take(f"{number:05d}") for number in range(4))
    done = _started(lambda: anything(model, out, Anything(waiting=waits.append, look=(0.02, 0.05))))
    _until(lambda: len(waits) > 3)
    assert set(waits) == {4}
    assert len(list(other.parts.glob("*.json"))) == 3
    assert not done.is_set()
    other.tidy()  # he stops, and says so
    assert done.wait(30)
    check(model, out)


def test_a_part_that_somebody_is_slow_at_is_made_by_one_more_and_not_by_two(model: Path, tmp_path: Path) -> None:
    """He goes on showing signs of life. A second time there is nothing to do but to wait for who made it again."""
    for number, others in enumerate((["00004"], ["00004", "again-00004"])):
        out, waits = tmp_path / f"out{number}", list[int]()
        other = staging_of(model, out)
        assert all(PartClaims(other).take(name) for name in others)
        done = _started(lambda: anything(model, out, Anything(waiting=waits.append, look=(0.02, 0.05))))  # noqa: B023
        if len(others) == 2:
            _until(lambda: len(waits) > 20)  # noqa: B023
            assert not done.is_set()
            other.tidy()
        assert done.wait(30)
        check(model, out)


def test_parts_whose_maker_writes_are_waited_for_however_old_their_claims(model: Path, tmp_path: Path) -> None:
    out, waits = tmp_path / "out", list[int]()
    other = staging_of(model, out)
    writing = [other.parts / f"{number:05d}.another.1.tmp" for number in range(4)]
    for number, path in enumerate(writing):
        assert PartClaims(other).take(f"{number:05d}")
        os.utime(other.parts / f"{number:05d}.0.claim", (0, 0))
        path.touch()
    done = _started(lambda: anything(model, out, Anything(gone=2.0, waiting=waits.append, look=(0.02, 0.05))))
    for _ in range(30):
        for path in writing:
            os.utime(path)
        time.sleep(0.1)
        assert not done.is_set()
    assert set(waits) == {4}
    assert done.wait(30)  # he is gone
    check(model, out)


def test_a_maker_that_is_killed_is_made_up_for(tmp_path: Path) -> None:
    """Large parts, so that there is a moment to kill it in."""
    save_file({f"w.{i}": np.ones(16 << 20, np.float32) for i in range(3)}, tmp_path / "model.safetensors")
    (tmp_path / "mapping.yaml").write_text(MAPPING)
    api.run(tmp_path / "mapping.yaml", tmp_path / "whole", QUICK)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "shardmerge", "run", str(tmp_path / "mapping.yaml"), "--part", "any"]
    killed = subprocess.Popen([*command, "--workers", "1"])
    left = _caught(killed, tmp_path)
    killed.kill()
    killed.wait()
    assert isinstance(anything(tmp_path, out, Anything(gone=1.0, look=(0.1, 0.2))), Result)
    assert not left.exists()
    check(tmp_path, out)


def test_a_task_that_is_stopped_takes_its_claims_back(model: Path, tmp_path: Path) -> None:
    """And what it left half written; what another one has begun is his."""
    out = tmp_path / "out"
    other = staging_of(model, out)
    assert PartClaims(other).take("00000")
    other.temporary("00000").touch()

    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    plan = api.plan(model / "mapping.yaml", QUICK)
    with pytest.raises((KeyboardInterrupt, ShardmergeError)):
        carry_out_share(plan, Anything(), out, QUICK, stop)
    left = {path for path in other.parts.iterdir() if path.suffix != ".json"}
    assert left == {other.temporary("00000"), other.parts / "00000.0.claim"}
    other.tidy()
    assert isinstance(anything(model, out, Anything(gone=1e6)), Result)
    check(model, out)


def test_a_task_that_waits_while_another_publishes_makes_nothing_again(model: Path, tmp_path: Path) -> None:
    """The files are under another name then, and must not be missed."""
    out, waits = tmp_path / "out", list[int]()
    other = staging_of(model, out)
    for index in range(2):
        task(model, out, f"{index}/3")
    assert PartClaims(other).take("finish")
    done = _started(lambda: anything(model, out, Anything(waiting=waits.append, look=(0.02, 0.05))))
    _until(lambda: len(waits) > 3)
    receipts = len(list(other.parts.glob("*.json")))
    other.tidy()
    assert done.wait(30)
    assert receipts < len(SIZES)
    check(model, out)


@pytest.mark.parametrize("what", ["mapping.yaml", "plan.json"])
def test_what_one_made_counts_though_another_publishes_before_it_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """One of three fails at its last step, since the other two have published what it was at work on."""
    given, out = tmp_path / what, tmp_path / "out"
    text = (model / "mapping.yaml").read_text().replace("m: model", f"m: {model}/model")
    (tmp_path / "mapping.yaml").write_text(text)
    if what == "plan.json":
        api.write_plan(api.prepare(tmp_path / "mapping.yaml", QUICK), given)
    commit, mine = PartMaker._commit, len(Share(0, 3).of([kib << 9 for kib in SIZES]))
    made = list[int]()

    def others_are_faster(maker: PartMaker, part: Part, *rest: Any) -> None:
        commit(maker, part, *rest)
        made.append(part.number)
        if len(made) == mine:
            monkeypatch.setattr(PartMaker, "_commit", commit)
            for share in ("1/3", "2/3"):
                api.run_part(given, share, out, QUICK)
            raise OutputError("unwritable-output", "its directory is gone")

    monkeypatch.setattr(PartMaker, "_commit", others_are_faster)
    state = api.run_part(given, "0/3", out, QUICK)
    assert isinstance(state, Result)
    assert state.made == mine - 1
    check(model, out)


def test_a_part_may_be_taken_to_be_published_while_it_is_looked_at(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was seen to be a file, and before it is opened."""
    staging = staging_of(model, tmp_path / "out")
    task(model, tmp_path / "out", "0/2")
    part = next(part for part in api.plan(model / "mapping.yaml", QUICK).parts() if is_made(staging, part))
    path = staging.model / part.shard.name
    is_file = Path.is_file

    def taken(self: Path) -> bool:
        there = is_file(self)
        if self == path and there:
            path.unlink()
        return there

    monkeypatch.setattr(Path, "is_file", taken)
    assert not is_made(staging, part)


@pytest.mark.parametrize(
    "look",
    [
        lambda staging: staging.claimed(),
        lambda staging: staging.tidy(),
        lambda staging: PartClaims(staging).at_work(),
        lambda staging: PartClaims(staging).is_held("finish"),
        lambda staging: PartClaims(staging).age(0),
        lambda staging: PartClaims(staging).take("00000"),
    ],
)
def test_all_that_was_staged_may_be_removed_while_it_is_looked_at(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Staging], object]
) -> None:
    """Between finding the directory and listing it."""
    staging = staging_of(model, tmp_path / "out")
    assert PartClaims(staging).take("00000")

    def removing(listing: Callable[..., Any]) -> Callable[..., Any]:
        def listed(path: Any = ".") -> Any:
            if staging.root.exists() and str(path).startswith(str(staging.root)):
                remove(staging.root, tmp_path / "out")
            return listing(path)

        return listed

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, removing(getattr(os, name)))
    assert not look(staging)


def test_who_was_about_to_publish_may_be_gone_when_he_is_looked_at(model: Path, tmp_path: Path) -> None:
    """Between the listing and the look: a link that leads nowhere is listed too."""
    staging = staging_of(model, tmp_path / "out")
    assert _life(staging) == []
    (staging.root / "ready-here").mkdir()
    (staging.root / "ready-gone").symlink_to("nowhere")
    assert [name for name, _ in _life(staging)] == ["ready-here"]


def test_a_receipt_that_is_seen_late_is_waited_for(model: Path, tmp_path: Path) -> None:
    """As from another node, through a directory that is cached."""
    out = tmp_path / "out"
    task(model, out, "0/2")
    staging = staging_of(model, out)
    parts = [part for part in api.plan(model / "mapping.yaml", QUICK).parts() if is_made(staging, part)]
    receipt = staging.parts / f"{parts[0].number:05d}.json"
    receipt.rename(tmp_path / "unseen")
    done = _started(lambda: await_receipts(parts, staging))
    time.sleep(1)
    assert not done.is_set()
    (tmp_path / "unseen").rename(receipt)
    assert done.wait(10)


def test_a_copy_of_a_staging_directory_is_another_maker(tmp_path: Path) -> None:
    import pickle

    staging = Staging.of(tmp_path / "out", "0" * 64)
    copy = pickle.loads(pickle.dumps(staging))
    assert copy == staging
    assert copy.who != staging.who
    assert Staging.of(tmp_path / "out", "0" * 64).who != staging.who


# --- Slurm ---


@pytest.fixture
def script(model: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    def printed(*options: object) -> str:
        out = ("--out", tmp_path / "out put")
        return shardmerge("slurm", model / "mapping.yaml", "--nodes", 3, *out, *options).stdout

    return printed


def test_the_script_is_one_for_bash_with_the_options_that_were_given(script: Callable[..., str]) -> None:
    text = script("--sbatch", "partition=long", "--sbatch", "-A proj", "--cpus", 2, "--", "--workers", 2)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True).stderr == ""
    first, *options, remark, last = text.splitlines()
    assert first == "#!/bin/bash"
    assert all(option.startswith("#SBATCH -") for option in options)
    assert remark.startswith("# Each task plans anew.")
    assert {"#SBATCH --array=0-2", "#SBATCH --cpus-per-task=2", "#SBATCH --partition=long", "#SBATCH -A proj"} < {
        *options
    }
    assert last.endswith("--workers 2")


def test_the_script_makes_the_result_task_by_task(model: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    """Through bash, in an empty environment but for what Slurm sets: no PATH, another directory."""
    text = script("--", "--no-sync")
    tasks = [
        subprocess.Popen(
            ["/bin/bash", "-s"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": "0", "SLURM_CPUS_PER_TASK": "1"},
        )
        for number in range(3)
    ]
    said = [one.communicate(text)[0] for one in tasks]
    assert [one.returncode for one in tasks] == [0, 0, 0]
    assert all("is published" in each for each in said)
    check(model, tmp_path / "out put")


def test_a_plan_is_named_and_takes_no_options_that_it_has_decided(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    shardmerge("plan", model / "mapping.yaml", "--out", plan)
    lines = shardmerge("slurm", plan, "--nodes", 2).stdout.splitlines()
    assert lines[-1].endswith(f"run {plan} --part any")
    assert lines[-2].startswith("#SBATCH")
    done = shardmerge("slurm", plan, "--nodes", 2, "--", "--dtype", "float16", code=2)
    assert "[no-effect]" in done.stderr


def test_what_run_refuses_is_refused_before_it_waits_in_a_queue(model: Path) -> None:
    done = shardmerge("slurm", model / "mapping.yaml", "--nodes", 3, "--", "--wrokers", 2, code=2)
    assert "--wrokers" in done.stderr
    assert done.stdout == ""


# --- helpers ---


def _started(work: Callable[[], object]) -> threading.Event:
    """Does work in a thread; the event is set when it ended well."""
    done = threading.Event()
    threading.Thread(target=lambda: (work(), done.set()), daemon=True).start()
    return done


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def _caught(process: subprocess.Popen[bytes], folder: Path) -> Path:
    """Stops a process while it writes a part."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for path in folder.glob("out.partial-*/parts/[0-9]*.tmp"):
            os.kill(process.pid, signal.SIGSTOP)
            if path.exists() and ".json." not in path.name:
                return path
            os.kill(process.pid, signal.SIGCONT)
    raise AssertionError("no part was ever on its way")
