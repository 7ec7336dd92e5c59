"""`--engine ray` on a real Ray cluster of three nodes, one of which is lost in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import shardmerge
from tests.test_executors import needs_ray

pytestmark = [pytest.mark.ray, needs_ray]

TENSORS, ELEMENTS = 12, 8 << 20
MAPPING = """\
shardmerge: 1
sources: {m: model.safetensors}
output: {path: out, dtype: bfloat16, shard_size: 17MB}
tensors:
  "{rest...}": m:{rest...}
"""
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up: see ``tests.ray_cluster``."""

    process: subprocess.Popen[str]
    address: str
    raylets: list[int]

    def lose(self, node: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"lose {node}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "lost\n"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.ray_cluster", "3", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    yield Cluster(process, **json.loads(next(line for line in process.stdout if line.startswith("{"))))
    process.communicate(timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    noise = np.random.default_rng(0).standard_normal(ELEMENTS, np.float32)
    save_file({f"w.{i}": np.roll(noise, i) for i in range(TENSORS)}, folder / "model.safetensors")
    (folder / "mapping.yaml").write_text(MAPPING)
    shardmerge("run", folder / "mapping.yaml", "--out", folder / "whole", "-q")
    return folder


def started(model: Path, out: Path, address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shardmerge", "run", str(model / "mapping.yaml"), "--out", str(out)]
    more = ["--engine", "ray", "--address", address]
    return subprocess.Popen([*command, *more], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def check(model: Path, out: Path) -> None:
    whole = model / "whole"
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes() or path.name == "shardmerge.json"
    assert not list(out.parent.glob("*.partial-*"))


def caught(folder: Path, raylet: int) -> Path:
    """Stops a worker of a node while it writes a part; returns the file."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for path in folder.glob("out.partial-*/parts/[0-9]*.tmp"):
            pid = int(path.name.split(".")[-2])
            try:
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == raylet and ".json." not in path.name:
                os.kill(pid, signal.SIGSTOP)
                if path.exists():
                    return path
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.005)
    raise AssertionError("no part was ever on its way there")


def test_a_node_is_lost_in_the_middle(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    run = started(model, tmp_path / "out", cluster.address)
    caught(tmp_path, cluster.raylets[2])
    cluster.lose(2)
    said, complained = run.communicate(timeout=300)
    assert run.returncode == 0, complained
    assert f"{TENSORS} tensors" in said
    check(model, tmp_path / "out")


def test_a_run_that_is_stopped_goes_on_and_tasks_are_gone(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    """SIGTERM reaches us, and not Ray's own handler; here goes on what was begun there."""
    run = started(model, tmp_path / "out", cluster.address)
    caught(tmp_path, cluster.raylets[1])
    _until_made(tmp_path, 2)
    run.terminate()
    _, complained = run.communicate(timeout=60)
    assert run.returncode == 5
    assert "to go on: shardmerge run" in complained
    staging = next(tmp_path.glob("out.partial-*"))
    before = {path.name: path.stat().st_ino for path in (staging / "model").iterdir()}
    shardmerge("run", model / "mapping.yaml", "--out", tmp_path / "out")
    assert len(before) >= 2
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in before} == before
    check(model, tmp_path / "out")


def test_a_cluster_that_does_not_answer(model: Path, tmp_path: Path) -> None:
    more = ("--engine", "ray", "--address", "127.0.0.1:1", "--out", tmp_path / "out")
    done = shardmerge("run", model / "mapping.yaml", *more, code=2)
    assert "[no-cluster]" in done.stderr
    assert not list(tmp_path.iterdir())


def _until_made(folder: Path, count: int) -> None:
    end = time.monotonic() + 120
    while len(list(folder.glob("out.partial-*/parts/0????.json"))) < count:
        assert time.monotonic() < end
        time.sleep(0.02)
