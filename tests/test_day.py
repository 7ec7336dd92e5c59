"""A process that uses the Python API over and over keeps nothing: a sample of ``python -m tests.day``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GOLDEN
from tests.day.content import digest
from tests.day.jobs import Job
from tests.day.tally import flatness, slope
from tests.staged import assert_nothing_done, assert_well_left

MIB = 1 << 20
ROOT = Path(__file__).parent.parent
JOBS = [
    Job("reshard", "small", str(GOLDEN / "xtuner" / "base_llm"), shard_size="8KB"),
    Job("zero3", "small", str(GOLDEN / "zero" / "llama_z3_w2_bf16" / "ckpt"), dtype="bfloat16"),
    Job("dcp", "small", str(GOLDEN / "dcp" / "fsdp2_w2_bf16" / "ckpt")),
]
# Its tensors are cut into boxes, so that a reader needs more than the open file.
COLUMNS = GOLDEN / "dcp" / "fsdp2_columns_w2_fp32" / "ckpt"
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Asks the process for something, and returns what it answered."""
    command = [sys.executable, "-m", "tests.day.api_process"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None

    def answered(request: dict[str, Any]) -> dict[str, Any]:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield answered
    process.communicate()
    assert process.returncode == 0


def test_thirty_conversions_leave_nothing_open_and_no_memory(ask: Ask, tmp_path: Path) -> None:
    """Every third fails: bytes that are no checkpoint, a budget that is too small, and one that is cancelled."""
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(bytes(range(256)) * 8)
    seen = []
    for number in range(30):
        job, out = JOBS[number % 2 if number % 3 else 2], tmp_path / str(number)
        spoilt = [{"given": str(noise)}, {"more": {"memory": "1MiB"}}, {"cancel": True}]
        bad = spoilt[number // 3 % 3] if number % 3 == 2 else {}
        answer = ask({**job.call(out), **bad})
        assert answer["exit"] == ([1, 4, 5][number // 3 % 3] if bad else 0), answer
        if "cancel" in bad:
            assert_well_left(out)
        elif bad:
            assert_nothing_done(out)
        else:
            assert ask({"do": "verify", "out": str(out)})["exit"] == 0
            assert ask({"do": "look", "given": str(out)})["exit"] == 0
        seen += [answer, ask({"do": "look", "given": str(COLUMNS)})]
    assert {len(answer["descriptors"]) for answer in seen} == {3}, seen[-1]
    assert all(answer["children"] == 0 for answer in seen)
    grown = seen[-1]["resident"] - seen[17]["resident"]  # each kind was converted, and failed, once
    print(f"{seen[17]['resident'] / MIB:.1f} MiB, and {grown / 1024:.0f} KiB more after {len(seen)} answers")
    assert grown < 2 * MIB


def test_a_digest_is_that_of_the_bytes_wherever_there_are_holes(tmp_path: Path) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    values = bytes(300_000) + b"value" + bytes(500_000)
    dense.write_bytes(values)
    with sparse.open("wb") as file:
        file.seek(300_000)
        file.write(b"value")
        file.truncate(len(values))
    assert sparse.stat().st_blocks < dense.stat().st_blocks
    assert digest(sparse) == digest(dense)
    others = values + b"\0", values[1:], values.replace(b"value", b"valuE"), b"\0" + values[:-1]
    for number, other in enumerate(others):
        (tmp_path / str(number)).write_bytes(other)
        assert digest(tmp_path / str(number)) != digest(dense)


def test_a_slope_is_that_of_the_points() -> None:
    assert slope([(0, 1), (1, 3), (2, 5)]) == 2
    grows = flatness([(60.0 * at, 1000 * at, 3 + (at > 50), at) for at in range(100)])
    assert (grows["descriptors at least"], grows["descriptors at most"]) == (3, 4)
    assert grows["resident bytes per thousand answers"] == 1_000_000
    assert grows["resident bytes per hour"] == 60_000
