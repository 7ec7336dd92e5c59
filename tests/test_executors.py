"""What every executor keeps to: all parts get receipts, errors come back, a part that fails leaves the others alone."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardmerge import api
from shardmerge.errors import CheckpointError, InterruptedRunError, Problems, ResourceError
from shardmerge.execute.executors.failures import error_from, rows_of

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: `make ray` installs it")
EXECUTORS = [
    pytest.param("here", 1, id="one process"),
    pytest.param("here", 2, id="several processes"),
    pytest.param("ray", 1, id="ray", marks=[pytest.mark.ray, needs_ray]),
]
PARTS, ROWS = 6, 1 << 16
MAPPING = """\
shardmerge: 1
sources: {%s}
output: {path: out, dtype: bfloat16, shard_size: 1KB}
tensors:
%s
"""


@dataclass(frozen=True)
class Ran:
    """What a run came to."""

    errors: list[dict[str, str]]
    made: list[int]
    bytes: int
    seconds: float


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    """A source file for each part."""
    rng = np.random.default_rng(0)
    for number in range(PARTS):
        save_file({"w": rng.standard_normal(ROWS, np.float32)}, tmp_path / f"s{number}.safetensors")
    sources = ", ".join(f"s{number}: s{number}.safetensors" for number in range(PARTS))
    rules = "\n".join(f"  w{number}: s{number}:w" for number in range(PARTS))
    (tmp_path / "mapping.yaml").write_text(MAPPING % (sources, rules))
    return tmp_path / "mapping.yaml"


def begun(engine: str, processes: int, mapping: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.executor_runs", engine, str(processes), str(mapping)]
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        [*command, str(mapping.parent / "out"), *more], cwd=root, env=env, stdout=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> Ran:
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0
    return Ran(**json.loads(said.splitlines()[-1]))


@pytest.mark.parametrize(("engine", "processes"), EXECUTORS)
def test_all_parts_get_receipts(engine: str, processes: int, mapping: Path) -> None:
    ran = ended(begun(engine, processes, mapping))
    assert ran.errors == []
    assert ran.made == list(range(PARTS))
    assert ran.bytes == PARTS * ROWS * 2
    out = mapping.parent / "out"
    api.finish(mapping, out)
    api.run(mapping, mapping.parent / "whole")
    for path in (mapping.parent / "whole").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("engine", "processes"), EXECUTORS)
def test_an_error_of_ours_comes_back_as_ours_and_leaves_what_is_made(
    engine: str, processes: int, mapping: Path
) -> None:
    """A source that is cut short after planning: it is planned when the process starts, and read when it is made."""
    process = begun(engine, processes, mapping, "0.5")
    staging = _first_receipt(mapping)
    with (mapping.parent / f"s{PARTS - 1}.safetensors").open("r+b") as file:
        file.truncate(1000)
    ran = ended(process)
    assert [error["code"] for error in ran.errors] == ["source-changed"]
    assert ran.errors[0]["kind"] == "CheckpointError"
    assert f"s{PARTS - 1}.safetensors" in ran.errors[0]["where"]
    assert 0 in ran.made
    assert PARTS - 1 not in ran.made
    assert engine == "ray" or not list(staging.glob("parts/*.tmp"))


@pytest.mark.parametrize(("engine", "processes"), EXECUTORS)
def test_ctrl_c_stops_it_within_two_seconds(engine: str, processes: int, mapping: Path) -> None:
    process = begun(engine, processes, mapping, "0.5")
    _first_receipt(mapping)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    ran = ended(process)
    took = time.monotonic() - sent
    assert [error["code"] for error in ran.errors] == ["interrupted"]
    assert 0 < len(ran.made) < PARTS
    assert took < (10 if engine == "ray" else 5)  # with the end of the interpreter, on a busy machine


def _first_receipt(mapping: Path) -> Path:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for path in mapping.parent.glob("out.partial-*/parts/0*.json"):
            return path.parent.parent
        time.sleep(0.01)
    raise AssertionError("no part was ever made")


def test_whose_parent_was_gone_before_it_could_ask_ends_at_once() -> None:
    code = "from shardmerge.execute.executors.here import _end_with; import os\n_end_with({})\nprint('at work')"
    for parent, said in (("os.getppid()", "at work\n"), ("os.getppid() + 1", "")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(parent)], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout) == (0 if said else 1, said)


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("source-changed", "it changed", where="a", found="b", expected="c", hint="d"),
        InterruptedRunError("interrupted", "stopped"),
        Problems([ResourceError("disk-full", "one", where="x"), CheckpointError("bad", "two")]),
        OSError(28, "No space left on device", "/x"),
        ValueError("a bug"),
    ],
)
def test_errors_travel(error: Exception) -> None:
    rows = json.loads(json.dumps(rows_of(error)))
    back = error_from(rows)
    assert rows_of(back) == rows or isinstance(error, ValueError)
    assert isinstance(back, RuntimeError if isinstance(error, ValueError) else type(error))
    assert str(error) in str(back)
