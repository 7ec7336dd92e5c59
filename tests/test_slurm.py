"""A plan made by tasks of a real Slurm cluster of three nodes: arrays, preemption, a lost node, a time limit.

Each ends with the bytes of one undisturbed run, and nothing is left over.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import shardmerge
from tests.slurm_cluster import SlurmCluster, needs_slurm, until

pytestmark = [pytest.mark.slurm, needs_slurm]

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
BIN = Path(sys.executable).parent
# Each becomes a file of 16 MB: long enough on its way to be caught there.
TENSORS, ELEMENTS = 12, 8 << 20
MAPPING = """\
shardmerge: 1
sources: {m: model.safetensors}
output: {path: out, dtype: bfloat16, shard_size: 17MB}
tensors:
  "{rest...}": m:{rest...}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three nodes."""
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", 3)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mapping, and what one undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("model")
    noise = np.random.default_rng(0).standard_normal(ELEMENTS, np.float32)
    save_file({f"w.{i}": np.roll(noise, i) for i in range(TENSORS)}, folder / "model.safetensors")
    (folder / "mapping.yaml").write_text(MAPPING)
    shardmerge("run", folder / "mapping.yaml", "--out", folder / "whole", "-q")
    return folder


class Array:
    """A result that tasks make, in a folder of its own."""

    def __init__(self, cluster: SlurmCluster, model: Path, folder: Path) -> None:
        self.cluster = cluster
        self.model = model
        self.folder = folder
        self.out = folder / "out"

    def script(self, nodes: int, *options: str) -> str:
        """The script that the command prints."""
        fit = ("--nodes", nodes, "--cpus", 2, "--mem", "500M", "--out", self.out, *options)
        return shardmerge("slurm", self.model / "mapping.yaml", *fit).stdout

    def submit(self, script: str, *options: str) -> str:
        return self.cluster.sbatch(*options, script=script, cwd=self.folder)

    def caught(self, node: str) -> tuple[int, Path]:
        """Stops a process of a node while it writes a part; returns its number, and the file."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for path in self.folder.glob("out.partial-*/parts/[0-9]*.tmp"):
                pid = int(path.name.split(".")[-2])
                if ".json." not in path.name and pid in self.cluster.processes(node):
                    os.kill(pid, signal.SIGSTOP)
                    if path.exists():
                        return pid, path
                    os.kill(pid, signal.SIGCONT)
            time.sleep(0.005)
        raise AssertionError("no part was ever on its way")

    def made(self) -> dict[str, int]:
        """Returns the parts that have receipts, and the inodes of their files."""
        staging = next(self.folder.glob("out.partial-*"))
        names = sorted(path.name for path in (self.model / "whole").glob("*.safetensors"))
        numbers = [int(path.stem) for path in (staging / "parts").glob("[0-9]*.json")]
        return {names[number]: (staging / "model" / names[number]).stat().st_ino for number in numbers}

    def check(self) -> None:
        """The bytes of one run, and nothing else."""
        assert list(self.folder.glob("out*")) == [self.out]
        whole = self.model / "whole"
        assert {path.name for path in self.out.iterdir()} == {path.name for path in whole.iterdir()}
        for path in whole.iterdir():
            assert (self.out / path.name).read_bytes() == path.read_bytes() or path.name == "shardmerge.json"
        shardmerge("verify", self.out, "-q")

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def array(cluster: SlurmCluster, model: Path, tmp_path: Path) -> Array:
    return Array(cluster, model, tmp_path)


def test_the_scripts_of_the_guide(array: Array) -> None:
    """Fixed shares and a dependent job, submitted as they are; the first task has number 1 here, and is the first."""
    mapping = array.folder / "mapping.yaml"  # the result goes beside it
    mapping.write_text(MAPPING.replace("model.safetensors", str(array.model / "model.safetensors")))
    shardmerge("plan", mapping, "--out", array.folder / "plan.json")
    fit = ("--cpus-per-task=1", "--mem=500M", "--output=%A_%a.log", f"--export=ALL,PATH={BIN}:/usr/bin:/bin")
    tasks = array.submit((EXAMPLES / "parts.sbatch").read_text(), *fit, "--array=1-3")
    last = array.submit((EXAMPLES / "finish.sbatch").read_text(), *fit, f"--dependency=afterok:{tasks}")
    assert array.cluster.ended(last) == ["COMPLETED"]
    assert array.cluster.ended(tasks) == ["COMPLETED"] * 3
    assert array.said().count("made 4 files") == 3
    array.check()


def test_the_printed_script_through_a_pipe(array: Array) -> None:
    job = array.submit(array.script(3, "--sbatch", "partition=low"))
    assert array.cluster.ended(job) == ["COMPLETED"] * 3
    logs = sorted(path.name for path in array.folder.glob("*.log"))
    assert logs == [f"shardmerge-{job}_{task}.log" for task in range(3)]
    assert array.said().count(f"{array.out} is published") == 3
    array.check()


def test_a_task_that_is_preempted_is_queued_again_and_goes_on(array: Array) -> None:
    """Slurm wakes what it ends: SIGCONT, SIGTERM, and SIGKILL five seconds later."""
    job = array.submit(array.script(1, "--sbatch", "nodelist=n1"))
    until(lambda: bool(list(array.folder.glob("out.partial-*/parts/00002.json"))), 60)
    array.caught("n1")
    before = array.made()
    other = array.cluster.sbatch(
        "--partition=high", "--nodelist=n1", "--exclusive", script="#!/bin/bash\nsleep 1", cwd=array.folder
    )
    assert array.cluster.ended(other) == ["COMPLETED"]
    array.cluster.at_once(job)
    assert array.cluster.ended(job) == ["COMPLETED"]
    assert array.cluster.restarts(job) == 1
    after = {name: (array.out / name).stat().st_ino for name in before}
    assert len(before) >= 3
    assert after == before
    assert "to go on: shardmerge run" in array.said()  # of the first time, and what followed was added to it
    made = re.search(rf"made (\d+) files; all {TENSORS} are there", array.said())
    assert made is not None
    # Between SIGCONT and SIGTERM it may have done the part under way, and the next ones: each takes milliseconds.
    assert 0 <= TENSORS - len(before) - int(made[1]) <= 3
    assert int(made[1]) < TENSORS - 2
    array.check()


def test_a_node_is_lost_and_others_make_up_for_it(array: Array) -> None:
    job = array.submit(array.script(3, "--sbatch", "no-requeue"))
    array.caught("n2")
    array.cluster.lose("n2")
    until(array.out.exists, 150)
    assert array.cluster.ended(job) == ["COMPLETED", "COMPLETED", "NODE_FAIL"]
    array.cluster.back("n2")
    array.check()


def test_a_node_is_lost_and_its_task_is_queued_again(array: Array) -> None:
    """Nobody else is there: the task itself goes on, on another node, and waits until it is sure to be the only one."""
    job = array.submit(array.script(1))
    until(lambda: array.cluster.queued(job) == ["RUNNING"], 60)
    node = array.cluster.said("squeue", "-h", "-j", job, "-o", "%N")
    array.caught(node)
    before = array.made()
    array.cluster.lose(node)
    array.cluster.at_once(job)
    assert array.cluster.ended(job, 200) == ["COMPLETED"]
    assert array.cluster.restarts(job) == 1
    assert {name: (array.out / name).stat().st_ino for name in before} == before
    array.cluster.back(node)
    array.check()


def test_a_time_limit_stops_it_and_the_same_script_goes_on(array: Array) -> None:
    """SIGUSR1 reaches the process, since the script's shell has given it its place; Slurm wakes what it signals."""
    job = array.submit(array.script(1, "--time", "2", "--sbatch", "nodelist=n0"))
    _, path = array.caught("n0")
    assert array.cluster.ended(job) == ["FAILED 5"]
    assert "to go on: shardmerge run" in array.said()
    assert not path.exists()
    before = array.made()
    again = array.submit(array.script(1))
    assert array.cluster.ended(again) == ["COMPLETED"]
    assert {name: (array.out / name).stat().st_ino for name in before} == before
    array.check()


def test_a_task_that_is_cancelled_stops_cleanly(array: Array) -> None:
    job = array.submit(array.script(1))
    until(lambda: array.cluster.queued(job) == ["RUNNING"], 60)
    _, path = array.caught(array.cluster.said("squeue", "-h", "-j", job, "-o", "%N"))
    array.cluster.said("scancel", job)
    assert array.cluster.ended(job)[0].startswith("CANCELLED")
    assert "to go on: shardmerge run" in array.said()
    assert not path.exists()
    again = array.submit(array.script(1))
    assert array.cluster.ended(again) == ["COMPLETED"]
    array.check()


def test_a_second_array_queued_behind_the_first_has_nothing_to_do(array: Array) -> None:
    first = array.submit(array.script(2))
    second = array.submit(array.script(2), f"--dependency=afterany:{first}")
    assert array.cluster.ended(second) == ["COMPLETED"] * 2
    made = [path.read_text() for path in array.folder.glob(f"shardmerge-{second}_*.log")]
    assert made == [f"made 0 files; all {TENSORS} are there: {array.out} is published\n"] * 2
    array.check()
