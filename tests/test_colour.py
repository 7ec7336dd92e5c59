"""Colours of what the command line says: in a terminal, and where somebody asks for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import shardmerge
from tests.terminal import in_terminal

RED, CYAN, OFF = "\x1b[1;31m", "\x1b[1;36m", "\x1b[0m"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A mapping with a key that is none: an error with a place, a caret and a hint."""
    path = tmp_path / "m.yaml"
    path.write_text("shardmerge: 1\nsources: {a: x}\noutputt: out\ntensors: {w: a:w}\n")
    return path


def test_a_terminal_shows_errors_in_colour(broken: Path) -> None:
    shown = in_terminal("plan", broken, code=1)
    assert f"{RED}error{OFF}: " in shown
    assert f"  {CYAN}hint{OFF}: " in shown
    assert f" {RED}^^^^^^^{OFF}\n" in shown


def test_a_pipe_has_no_colour(broken: Path) -> None:
    assert "\x1b" not in shardmerge("plan", broken, code=1).stderr


@pytest.mark.parametrize(
    ("given", "env", "coloured"),
    [
        ([], {}, True),
        ([], {"NO_COLOR": "1"}, False),
        ([], {"NO_COLOR": ""}, True),
        ([], {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ([], {"TERM": "dumb"}, False),
        (["--color", "never"], {"FORCE_COLOR": "1"}, False),
        (["--color", "always"], {"NO_COLOR": "1"}, True),
    ],
)
def test_a_terminal(given: list[str], env: dict[str, str], coloured: bool, broken: Path) -> None:
    assert ("\x1b[" in in_terminal(*given, "plan", broken, code=1, env=env)) == coloured


@pytest.mark.parametrize(
    ("given", "env", "coloured"),
    [
        ([], {}, False),
        ([], {"FORCE_COLOR": "1"}, True),
        ([], {"FORCE_COLOR": "0"}, False),
        ([], {"CLICOLOR_FORCE": "1"}, True),
        (["--color", "always"], {}, True),
        (["--color", "auto"], {}, False),
    ],
)
def test_a_log(given: list[str], env: dict[str, str], coloured: bool, broken: Path) -> None:
    without = {name: text for name, text in os.environ.items() if "COLOR" not in name}
    done = shardmerge(*given, "plan", broken, code=1, env={**without, **env})
    assert ("\x1b[" in done.stderr) == coloured


def test_a_usage_error_is_red(broken: Path) -> None:
    assert f"{RED}Error{OFF}: No such option" in in_terminal("plan", "--wrong", code=2)
