"""The tasks of a newcomer, as transcripts that are run: what is typed works, and shows what a person needs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.memory_group import memory_group
from tests.terminal import plain
from tests.transcripts import ROOT, Step, agrees, missing_words, play, play_cells, read_transcript

TASKS = Path(__file__).parent / "tasks"


def steps_of(name: str) -> list[Step]:
    return read_transcript((TASKS / f"{name}.txt").read_text("utf-8"))


def prepared(tmp_path: Path, golden: Path) -> tuple[Path, dict[str, str]]:
    (tmp_path / "here").mkdir()
    return tmp_path / "here", {"GOLDEN": str(golden)}


@pytest.mark.parametrize("name", sorted(path.stem for path in TASKS.glob("*.txt") if path.stem != "notebook"))
def test_a_task_goes_as_its_transcript_says(name: str, tmp_path: Path, golden: Path) -> None:
    folder, env = prepared(tmp_path, golden)
    steps = steps_of(name)
    with memory_group(128 << 20) as group:
        played = play(steps, folder, env | {"GROUP": group.procs if group else ""})
    for step, shown in zip(steps, played, strict=True):
        assert agrees(step.shown, shown), f"{name}.txt:{step.line}: $ {step.command}\n" + "\n".join(shown)


COLUMNS = 80


def _breaks_by_itself(line: str) -> bool:
    """Tells whether a terminal is to break a line, so that it is copied whole: a path, and what an error says to do."""
    return line.startswith(("error: ", "  hint: ")) or max(map(len, line.split())) > COLUMNS - 20


@pytest.mark.parametrize("name", ["zero3", "xtuner", "compare"])
def test_a_narrow_terminal_shows_all_of_it(name: str, tmp_path: Path, golden: Path) -> None:
    """No line is longer than the terminal is wide but for a path, and every word that a file gets is there."""
    folder, env = prepared(tmp_path, golden)
    steps = [step for step in steps_of(name) if not (step.command.startswith("python") and "print" in step.command)]
    for step, shown in zip(steps, play(steps, folder, env, COLUMNS), strict=True):
        if not step.command.startswith("shardmerge "):
            continue
        at = f"{name}.txt:{step.line}: $ {step.command}\n"
        lines = [plain(part) for line in shown for part in line.split("\r")]
        assert [line for line in lines if len(line) > COLUMNS and not _breaks_by_itself(line)] == [], at
        assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines), at
        expected = [line for line in step.shown if not re.search(r"\.\.\.", line)]
        assert list(missing_words(expected, lines)) == [], at + "\n".join(lines)


MAPPING = """\
shardmerge: 1
sources: {trained: checkpoint-2}
output: out
target: {name: hf/model, text: trained}
tensors:
  "{rest...}": trained:{rest...}
"""


def test_a_notebook_goes_as_its_transcript_says(tmp_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = prepared(tmp_path, golden)
    shutil.copytree(golden / "hf_trainer" / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(golden / "hf_trainer" / "truth.safetensors", folder)
    (folder / "mapping.yaml").write_text(MAPPING, "utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    steps = read_transcript((TASKS / "notebook.txt").read_text("utf-8"), "In: ")
    for step, shown in zip(steps, play_cells(steps, folder), strict=True):
        assert agrees(step.shown, shown), f"notebook.txt:{step.line}\n" + "\n".join(shown)
