"""Completion as a real shell does it: bash reads the script that we print, and completes what stands on its line."""

from __future__ import annotations

import contextlib
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shardmerge as package
from shardmerge.cli.error_codes import error_codes
from shardmerge.dtypes import FLOAT_SPELLINGS
from tests.conftest import shardmerge

BASH = """
eval "$(shardmerge completion bash)"
compopt() { echo "compopt" "$@" >&2; }
COMP_WORDS=(@)
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
complete -p shardmerge >&2
_shardmerge_completion shardmerge "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with a command ``shardmerge`` that runs this code."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "shardmerge"
    program.write_text(f"#!{sys.executable}\nfrom shardmerge.cli.main import main\nmain()\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def bash(path: str, *words: str) -> tuple[list[str], str]:
    """What bash offers for the last word, and what completion wrote to stderr."""
    script = BASH.replace("(@)", f"({shlex.join(['shardmerge', *words])})")
    root = str(Path(package.__file__).parent.parent)
    env = {**os.environ, "PATH": path, "PYTHONPATH": root}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True, env=env)
    assert "complete -o nosort -F _shardmerge_completion shardmerge" in done.stderr
    return done.stdout.split(), done.stderr


def test_commands(path: str) -> None:
    assert bash(path, "in")[0] == ["init", "inspect", "invert"]


def test_options(path: str) -> None:
    assert bash(path, "convert", "--dry")[0] == ["--dry-run"]
    assert bash(path, "run", "--engine", "")[0] == ["here", "ray"]


def test_presets(path: str) -> None:
    xtuner = [one.name for one in package.presets() if one.name.startswith("xtuner/")]
    assert len(xtuner) == 3
    assert bash(path, "convert", "--use", "xtuner/")[0] == xtuner
    assert bash(path, "presets", "show", "xtuner/")[0] == xtuner


def test_targets(path: str) -> None:
    assert bash(path, "init", "last.pth", "--to", "official/")[0] == ["official/llava"]


def test_sources_of_the_preset(path: str) -> None:
    found, said = bash(path, "convert", "--use", "xtuner/llava-to-hf", "--base", "")
    assert found == ["trained=", "llm=", "vision="]
    assert "compopt -o nospace" in said
    assert "adapter=" in bash(path, "convert", "--base", "")[0]


@pytest.mark.parametrize("option", [("convert", "--dtype"), ("diff", "--cast")])
def test_types(path: str, option: tuple[str, str]) -> None:
    assert bash(path, *option, "float8")[0] == [one for one in FLOAT_SPELLINGS if one.startswith("float8")]


def test_error_codes(path: str) -> None:
    found, said = bash(path, "errors", "missing-")
    assert found == [code for code in error_codes() if code.startswith("missing-")]
    assert "nospace" not in said


def test_a_key_press_in_an_interactive_shell(path: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(package.__file__).parent.parent), "TERM": "dumb"}
    shell = subprocess.Popen(
        ["bash", "--norc", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=env,
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, b'eval "$(shardmerge completion bash)"\nshardmerge errors missing-ran\t> told\nexit\n')
    with contextlib.suppress(OSError):  # the terminal ends with the shell
        while os.read(ours, 65536):
            pass
    os.close(ours)
    assert shell.wait(60) == 0
    assert (tmp_path / "told").read_text().startswith("missing-rank (checkpoint)\n")


@pytest.mark.parametrize("words", [("run", ""), ("convert", ""), ("verify", "out", "--sources", ""), ("diff", "a", "")])
def test_paths(path: str, words: tuple[str, ...]) -> None:
    assert "compopt -o default" in bash(path, *words)[1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str, tmp_path: Path) -> None:
    script = shardmerge("completion", shell).stdout
    assert f"_SHARDMERGE_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
