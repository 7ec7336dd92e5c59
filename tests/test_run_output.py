"""What a run says: three lines before, phases meanwhile, three lines of what came of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.harness import measure
from tests.conftest import shardmerge
from tests.terminal import in_terminal, plain


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a checkpoint of 16 tensors, and a mapping that casts it into ``out``."""
    (tmp_path / "model").mkdir()
    save_file({f"l.{i}.weight": torch.randn(256, 256) for i in range(16)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "m.yaml").write_text(
        "shardmerge: 1\nsources: {m: model}\noutput: {path: out, dtype: bfloat16}\ntensors: {'{r...}': 'm:{r...}'}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


BEFORE = """\
state-dict -> out: 16 tensors, 2.10 MB in 3 files
from m \\(safetensors\\)
planned peak \\d+ MiB, 2 workers
"""
AFTER = """\
published out: 16 tensors, 2.10 MB in 3 files
\\d+\\.\\d s \\(\\S+ [KMG]B/s\\), 2.10 MB computed, peak memory \\d+ MiB
next: shardmerge verify out
"""
SHARDS = ("--shard-size", "800KB", "--workers", "2")


def test_three_lines_before_and_three_after(place: Path) -> None:
    done = shardmerge("run", "m.yaml", *SHARDS)
    assert re.fullmatch(BEFORE, done.stderr)
    assert re.fullmatch(AFTER, done.stdout)


def test_convert_says_the_same(place: Path) -> None:
    done = shardmerge("convert", "model", "out", "--dtype", "bfloat16", *SHARDS)
    assert re.fullmatch(BEFORE.replace("from m ", "from source "), done.stderr)
    assert re.fullmatch(AFTER, done.stdout)


def test_what_comes_next_works_as_it_is_printed(place: Path) -> None:
    """Whatever the directory is called, a shell takes the line."""
    out = "out of $HOME; it's"
    line = shardmerge("convert", "model", out).stdout.splitlines()[2]
    command = line.removeprefix("next: ").replace("shardmerge", f"{sys.executable} -m shardmerge", 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ok  ")


def test_quiet_says_nothing(place: Path) -> None:
    done = shardmerge("run", "m.yaml", "-q")
    assert (done.stdout, done.stderr) == ("", "")


def test_verbose_shows_the_plan(place: Path) -> None:
    plan = shardmerge("plan", "m.yaml").stdout
    done = shardmerge("run", "m.yaml", "-v")
    assert done.stdout.startswith(plan + "\n" + "published out: ")
    assert done.stderr == ""


@pytest.mark.parametrize("other", ["--quiet", "--json"])
def test_verbose_where_nothing_is_shown(other: str, place: Path) -> None:
    done = shardmerge("run", "m.yaml", "-v", other, code=2)
    assert "--verbose shows the plan, and --quiet and --json show none [no-effect]" in done.stderr
    assert "hint: leave --verbose out" in done.stderr
    assert not (place / "out").exists()


def test_what_was_made_before_is_said(place: Path) -> None:
    shardmerge("run", "m.yaml", *SHARDS, "--part", "0/3")
    assert ", 1 of 3 files were made before\n" in shardmerge("run", "m.yaml", *SHARDS).stdout
    assert "in 3 files\nthere already, nothing to do\n" in shardmerge("run", "m.yaml", *SHARDS).stdout


def test_the_peak_is_the_kernels(place: Path) -> None:
    """Against what the harness of the benchmarks measures of the same process; what ends it comes on top."""
    done = measure([sys.executable, "-m", "shardmerge", "run", "m.yaml"])
    found = re.search(r"peak memory (\d+) MiB", done.stdout)
    assert found is not None
    assert done.peak / 2**20 - 4 <= int(found[1]) <= done.peak / 2**20 + 1


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_every_phase_and_keeps_the_result(columns: int, place: Path) -> None:
    shown = plain(in_terminal("run", "m.yaml", *SHARDS, columns=columns))
    assert re.match(BEFORE, shown)
    assert re.search(rf"\r *\r{AFTER}$", shown)
    meanwhile = re.split(r"[\r\n]", shown)
    phases = [line.split()[0] for line in meanwhile if re.match(r"\w+ out: +\d+%", line)]
    assert list(dict.fromkeys(phases)) == ["writing", "syncing", "publishing"]
    assert all(len(line) <= columns for line in meanwhile)
    assert any(re.search(r"B/s, \d+ MiB resident\]", line) for line in meanwhile)


def test_nothing_is_synced_that_is_not_to_be(place: Path) -> None:
    assert "syncing" not in in_terminal("run", "m.yaml", "--no-sync")


def test_a_bar_leaves_the_process_a_single_thread(place: Path) -> None:
    """Only such a process may fork: parts would be made by one process wherever somebody watches."""
    program = (
        "import os\nfrom shardmerge.cli.progress import progress_bar\n"
        "with progress_bar(10, quiet=False, label='x') as bar:\n"
        "    bar(1); print('threads', len(os.listdir('/proc/self/task')))\n"
    )
    assert "threads 1\n" in in_terminal(program=("-c", program))
