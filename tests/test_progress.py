"""What a command says of its progress: in a log, in a terminal, as JSON lines."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge.cli import progress
from tests.conftest import shardmerge

# The command with other limits of time.
_LIMITED = "import sys; from shardmerge.cli import main, progress; {}; main.main()"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({f"l.{i}.weight": torch.randn(256, 256) for i in range(16)}, folder / "model.safetensors")
    return folder


def limited(limits: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", _LIMITED.format(limits), *map(str, arguments)]


class Clock:
    """Stands for ``time.monotonic`` where minutes go by."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("minutes", [1, 30, 600])
def test_a_log_is_never_silent_for_longer_than_half_a_minute(
    minutes: int, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether bytes move or not; and a fast run does not fill it."""
    total, lines, last = 10**11, [], clock.now
    ticks = minutes * 60 * 2
    with progress.progress_bar(total, quiet=False, label="out") as advance:
        assert advance is not None
        for tick in range(ticks):
            clock.now += 0.5
            advance(total // ticks if tick % 7 == 0 else 0)
            found = said(capfd)
            if found:
                assert clock.now - last <= 30
                lines += found
                last = clock.now
        assert clock.now - last <= 30
    assert len(lines) <= minutes * 2 + 21
    assert all(line.startswith("writing out: ") for line in lines)


def test_a_line_says_how_far_it_is_how_fast_and_how_long_it_takes(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with progress.progress_bar(100 * 10**9, quiet=False, label="llava", after="syncing") as advance:
        assert advance is not None
        clock.now += 4.9
        advance(5 * 10**9)
        assert said(capfd) == []  # what is over sooner is not told
        clock.now += 5.1
        advance(5 * 10**9)
        (line,) = said(capfd)
        assert re.fullmatch(r"writing llava: 10 % of 100.00 GB, 1.00 GB/s, 90 s left, \d+ MiB resident", line)
        clock.now += 9.9
        advance(30 * 10**9)
        assert said(capfd) == []  # lines are ten seconds apart
        clock.now += 0.2
        advance(0)
        assert said(capfd)[0].startswith("writing llava: 40 % of ")
        clock.now += 10
        advance(60 * 10**9)
        assert said(capfd)[0].startswith("syncing llava: 0 s, ")
        clock.now += 30
        advance(0)
        assert said(capfd)[0].startswith("syncing llava: 30 s, ")
        advance.begin("publishing")
        assert said(capfd)[0].startswith("publishing llava: 0 s, ")


def test_how_long_is_said_in_units_that_fit() -> None:
    assert [progress._duration(seconds) for seconds in (3.4, 99, 150, 5000, 7500)] == [
        "3 s", "99 s", "2 min", "83 min", "2 h 05 min",
    ]  # fmt: skip


def test_a_run_that_takes_its_time_tells_all_phases(source: Path) -> None:
    """With limits so short that every moment is told."""
    limits = "progress._SOON = progress._LONGEST = progress._SHORTEST = 0.0; progress._LOOK = 0.01"
    done = subprocess.run(
        limited(limits, "convert", source, source.parent / "out", "--dtype", "bfloat16", "--shard-size", "100KB"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.endswith(" MiB resident")]
    phases = [line.split()[0] for line in lines]
    assert sorted(set(phases), key=phases.index) == ["planning", "writing", "syncing", "publishing"]
    assert "publishing" in phases[-2:]  # while the directory is renamed, too


def test_verifying_is_called_so_and_publishes_nothing(source: Path) -> None:
    out = source.parent / "out"
    shardmerge("convert", source, out)
    limits = "progress._SOON = progress._LONGEST = progress._SHORTEST = 0.0"
    done = subprocess.run(limited(limits, "verify", out), capture_output=True, text=True, check=True)
    assert {line.partition(":")[0] for line in done.stderr.splitlines() if "resident" in line} == {"verifying out"}


ALL_IS_TOLD = "progress._SOON = progress._LONGEST = progress._SHORTEST = 0.0; progress._LOOK = 0.001"


def test_reading_headers_and_comparing_are_called_so(source: Path) -> None:
    out = source.parent / "out"
    shardmerge("convert", source, out)
    done = subprocess.run(limited(ALL_IS_TOLD, "diff", source, out), capture_output=True, text=True, check=True)
    told = [line.partition(":")[0] for line in done.stderr.splitlines() if "resident" in line]
    assert list(dict.fromkeys(told)) == ["reading headers model and out", "comparing model"]
    assert "100 % of 4.19 MB" in done.stderr
    done = subprocess.run(limited(ALL_IS_TOLD, "inspect", out), capture_output=True, text=True, check=True)
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {"reading headers out"}
    for command in (["inspect", out], ["diff", source, out], ["verify", out, "--reference", source]):
        done = subprocess.run(limited(ALL_IS_TOLD, *command, "-q"), capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_what_a_timer_says_imports_nothing() -> None:
    """It comes in the middle of imports, of codecs too: `unknown encoding: ascii` was once the answer."""
    program = """
import json, sys
from shardmerge.cli import progress
told = progress._Told("planning", "model", 0, machine=False)
before = set(sys.modules)
told._line(1.0), told._row(1.0)
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reference_is_a_part_of_what_is_verified(source: Path) -> None:
    """The bytes of the directory once for its checksums, once for each comparison."""
    out = source.parent / "out"
    shardmerge("run", _mapping(source), "--out", out)
    command = ["verify", out, "--reference", source, "--sources", _mapping(source)]
    done = subprocess.run(limited(ALL_IS_TOLD, *command), capture_output=True, text=True, check=True)
    shares = [int(found) for found in re.findall(r"(\d+) % of", done.stderr)]
    assert shares == sorted(shares)
    assert 98 <= shares[-1] <= 100


def test_a_share_tells_no_progress(source: Path) -> None:
    done = shardmerge("run", _mapping(source), "--part", "0/2", "--log-json", code=2)
    assert "[no-effect]" in done.stderr
    assert "leave --log-json out" in done.stderr


def test_a_quick_run_tells_no_progress(source: Path) -> None:
    lines = shardmerge("convert", source, source.parent / "out").stderr.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("planned peak ")


def test_json_lines(source: Path) -> None:
    done = shardmerge("convert", source, source.parent / "out", "--log-json", "--json", "--shard-size", "1MB")
    rows = [json.loads(line) for line in done.stderr.splitlines()]
    assert [row["phase"] for row in rows] == ["planning", "writing", "syncing", "publishing"]
    assert rows[1]["total"] == 16 * 4 * 256 * 256
    assert json.loads(done.stdout)["parts_made"] > 1
    again = shardmerge("run", _mapping(source), "--log-json", "-q").stderr
    assert [json.loads(line)["phase"] for line in again.splitlines()] == [
        "planning",
        "writing",
        "syncing",
        "publishing",
    ]


def test_warnings_are_json_lines_too(source: Path) -> None:
    """No index names the shards."""
    for number in (1, 2):
        save_file({f"l.{number}": torch.randn(2)}, source / f"model-0000{number}-of-00002.safetensors")
    (source / "model.safetensors").unlink()
    done = shardmerge("convert", source, source.parent / "out", "--log-json", "--json")
    rows = [json.loads(line) for line in done.stderr.splitlines()]
    assert [row["warning"] for row in rows if "warning" in row] == json.loads(done.stdout)["warnings"] != []


def _mapping(source: Path) -> Path:
    path = source.parent / "mapping.yaml"
    path.write_text(f'shardmerge: 1\nsources: {{m: {source}}}\noutput: again\ntensors: {{"{{r...}}": "m:{{r...}}"}}\n')
    return path


def test_planning_in_a_terminal_is_a_line_that_goes_away(source: Path) -> None:
    limits = "progress._SOON = 0.0; progress._LOOK = 0.01"
    master, slave = pty.openpty()
    command = limited(limits, "convert", source, source.parent / "out", "--dry-run")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave) as process:
        assert process.wait() == 0
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "\r\033[Kplanning " in shown
    assert shown.endswith("\r\033[K")
    assert "\n" not in shown


def test_the_timer_of_planning_is_gone_when_it_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    """And one that somebody else has set is left alone, with what it is to do."""
    found = signal.getsignal(signal.SIGALRM)
    with progress.planning("m", quiet=False):
        assert signal.getitimer(signal.ITIMER_REAL)[1] == progress._LOOK
        assert signal.getsignal(signal.SIGALRM) != found
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == found
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    with progress.planning("m", quiet=False, machine=True):
        time.sleep(0.05)
    signal.signal(signal.SIGALRM, before)
    assert heard == [signal.SIGALRM]
    assert said(capfd) == []


def test_planning_leaves_an_alarm_to_whoever_took_it_meanwhile() -> None:
    """A stop that has to wait a moment takes it, and would be lost."""
    heard: list[int] = []
    before = signal.getsignal(signal.SIGALRM)
    with progress.planning("m", quiet=False):
        signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(0.1)
    signal.signal(signal.SIGALRM, before)
    assert heard == [signal.SIGALRM]


def test_planning_leaves_the_process_a_single_thread(source: Path) -> None:
    """Only such a process may fork, and a plan says how many there will be. Two tensors of 1 GiB, all holes."""
    rows = 1 << 18
    tensors = {
        str(n): {"dtype": "F32", "shape": [rows, 1 << 10], "data_offsets": [n << 30, n + 1 << 30]} for n in range(2)
    }
    header = json.dumps(tensors).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (2 << 30))
    done = shardmerge("plan", _mapping(source), "--shard-size", "1GB", "--workers", "2", "--json")
    assert json.loads(done.stdout)["cost"]["processes"] == 2


def test_a_run_that_goes_on_counts_what_was_made_before(source: Path) -> None:
    out = source.parent / "out"
    plan = sm.plan(_mapping(source), options=sm.Options(shard_size=600_000))
    from shardmerge import api

    api.run_part(_mapping(source), "0/2", out, sm.Options(shard_size=600_000))
    told: list[int] = []
    sm.run(_mapping(source), out=out, options=sm.Options(shard_size=600_000), progress=told.append)
    assert 0 < told[0] < sum(told) == plan.tensor_bytes
