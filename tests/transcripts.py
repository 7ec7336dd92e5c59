"""Transcripts that are tests: what is typed and what is shown, as a person reads it.

A line that begins with ``$ `` is typed into bash, with the lines after it that begin with ``> ``; what follows is what
it shows, on stdout and stderr together. ``...`` stands for any text, on a line of its own for any lines. Seconds,
rates, mebibytes, workers and plan ids are not compared. ``[exit N]`` ends what a command shows that ends with another
status than 0. A line that begins with ``## `` speaks to the reader. All commands of a file run in one shell, in a new
directory.

``$GOLDEN`` is the directory of checkpoints that real tools wrote. ``hint`` prints the text of the last hint that was
shown, ``hint N`` the N-th of what it has in backticks. ``node`` lets a subshell have 128 MiB and no more: in the
control group ``$GROUP``, or where none may be made by a limit of what the process itself takes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.terminal import program_in_terminal

ROOT = Path(__file__).parent.parent

# What a command is told apart by: nothing that one shows by itself.
_END = "\x1f"
_PRELUDE = r"""
hint() {
  local text; text=$(grep '^ *hint: ' "$SHOWN" | tail -n 1 | sed 's/^ *hint: //')
  if [ "$1" ]; then grep -o '`[^`]*`' <<< "$text" | tr -d '`' | sed -n "$1p"; else echo "$text"; fi
}
node() { if [ "$GROUP" ]; then echo $BASHPID > "$GROUP"; else ulimit -d 131072; fi; }
"""

_VARYING = [
    (re.compile(r"\b\d+(\.\d+)? [kKMGT]?B/s"), "N B/s"),
    (re.compile(r"\b\d+(\.\d+)? (s|min|MiB|workers)\b"), r"N \2"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "ID"),
]


@dataclass(frozen=True, slots=True)
class Step:
    """A command, or a cell of a notebook, and what it shows.

    Attributes
    ----------
    line
        Where it stands, counted from 1.
    command
        For bash, or Python.
    shown
        Lines.
    """

    line: int
    command: str
    shown: tuple[str, ...]


def read_transcript(text: str, mark: str = "$ ") -> list[Step]:
    """Returns the steps of a transcript; each begins with the mark."""
    steps: list[tuple[int, list[str], list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(mark):
            steps.append((number, [line[len(mark) :]], []))
        elif line.startswith("> "):
            steps[-1][1].append(line[2:])
        elif line == ">":
            steps[-1][1].append("")
        elif not line.startswith("##") and steps:
            steps[-1][2].append(line)
    return [Step(number, "\n".join(command), tuple(_trimmed(shown))) for number, command, shown in steps]


def play(steps: Sequence[Step], folder: Path, env: dict[str, str], columns: int = 0) -> list[list[str]]:
    """Runs the commands of a transcript in a directory, and returns the lines that each shows.

    Parameters
    ----------
    columns
        Of a terminal in which they run; 0 for a file.
    """
    shown, script = folder.parent / "shown", folder.parent / "script.sh"
    script.write_text(_PRELUDE + "".join(f"{step.command}\nprintf '{_END}%d{_END}' $?\n" for step in steps), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env, "SHOWN": str(shown)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if columns:
        text = program_in_terminal(["bash", str(script)], columns=columns, env=environment, cwd=folder)
    else:
        with shown.open("ab") as file:
            subprocess.run(
                ["bash", str(script)], cwd=folder, env=environment, check=False, timeout=300,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        text = shown.read_text("utf-8")
    parts = text.split(_END)
    assert len(parts) == 2 * len(steps) + 1, f"the shell ended after {len(parts) // 2} commands:\n{text}"
    return [_with_status(output, status) for output, status in zip(parts[0::2], parts[1::2], strict=False)]


def _with_status(output: str, status: str) -> list[str]:
    return [*_trimmed(output.split("\n")), *([f"[exit {status}]"] if status != "0" else [])]


def _trimmed(lines: Sequence[str]) -> list[str]:
    """Returns lines without blanks at their ends, and without empty ones at the end of all."""
    stripped = [line.rstrip() for line in lines]
    while stripped and not stripped[-1]:
        stripped.pop()
    return stripped


def settled(line: str) -> str:
    """Returns a line with what differs from run to run put in words."""
    for pattern, instead in _VARYING:
        line = pattern.sub(instead, line)
    return re.sub(r" {2,}", "  ", line)  # a column is as wide as its numbers


def agrees(expected: Sequence[str], shown: Sequence[str]) -> bool:
    """Tells whether lines are those that a transcript has."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(settled(line)).replace(r"\.\.\.", ".*") + r"\n"
        for line in expected
    )
    return re.fullmatch(pattern, "".join(f"{settled(line)}\n" for line in shown)) is not None


def missing_words(piped: Sequence[str], lines: Sequence[str]) -> Iterator[str]:
    """Yields the words of a file that a terminal does not show: whole, or broken and gone on with straight below."""
    words = {word for line in piped for word in settled(line).split()}
    for word in sorted(words - {"N", "ID"}):
        if not any(_goes_on(word, lines, number) for number in range(len(lines))):
            yield word


def _goes_on(word: str, lines: Sequence[str], number: int) -> bool:
    line = settled(lines[number])
    if word in line.split():
        return True
    return any(
        _rest(word, lines, number, place) for place in range(len(lines[number])) if lines[number][place] == word[0]
    )


def _rest(word: str, lines: Sequence[str], number: int, place: int) -> bool:
    """Tells whether a word begins at a place and goes on below it."""
    if not word:
        return True
    if number == len(lines):
        return False
    piece = lines[number][place:].split(" ", 1)[0]
    return bool(piece) and word.startswith(piece) and _rest(word[len(piece) :], lines, number + 1, place)


def play_cells(steps: Sequence[Step], folder: Path) -> list[list[str]]:
    """Runs the cells of a notebook in a directory, and returns the lines that each shows as text."""
    import nbformat
    from nbclient import NotebookClient

    kernel = folder.parent / "kernels" / "here"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(step.command) for step in steps])
    NotebookClient(notebook, kernel_name="here", timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return [_trimmed([line for output in cell.outputs for line in _output_lines(output)]) for cell in notebook.cells]


def _output_lines(output: Mapping[str, Any]) -> Iterator[str]:
    if output["output_type"] == "stream":
        yield from output["text"].splitlines()
    else:
        yield from output["data"]["text/plain"].splitlines()
        yield from ["[html]"] * ("text/html" in output["data"])
