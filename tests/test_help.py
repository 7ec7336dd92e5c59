"""The help of every command fits a terminal, and its two examples are calls that the command takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from shardmerge.cli.examples import EXAMPLES
from shardmerge.cli.main import cli


def commands(group: click.Group, above: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} ")
        else:
            yield f"{above}{name}"


NAMES = list(commands(cli))


def command(name: str) -> click.Command:
    found: click.Command = cli
    for word in name.split():
        assert isinstance(found, click.Group)
        found = found.commands[word]
    return found


def help_of(name: str) -> str:
    return CliRunner(env={"COLUMNS": "80"}).invoke(cli, [*name.split(), "--help"], prog_name="shardmerge").output


@pytest.mark.parametrize("name", ["", *NAMES])
def test_help_fits_80_columns(name: str) -> None:
    assert max(map(len, help_of(name).splitlines())) <= 80


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_with_two_examples(name: str) -> None:
    before, _, after = help_of(name).partition("\n  Examples:\n")
    assert "Options:" in before
    assert [line.strip() for line in after.splitlines()] == [f"shardmerge {line}" for line in EXAMPLES[name]]


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_calls_of_the_command(name: str) -> None:
    """Parsed by click itself, with the options that there are: an unknown one, or a missing argument, is an error."""
    for line in EXAMPLES[name]:
        words, command = shlex.split(line.partition(" > ")[0], comments=True), cli
        context = click.Context(cli, info_name="shardmerge")
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
            if not isinstance(command, click.Group):
                command.make_context(command.name, words, parent=context)
        assert name.endswith(str(command.name))


def test_there_are_no_other_examples() -> None:
    assert set(EXAMPLES) == set(NAMES)


def test_a_path_is_looked_at_by_what_uses_it() -> None:
    """click calls a path that may not be read wrong usage; we say what the system refused, and what to do."""
    paths = [(name, one) for name in NAMES for one in command(name).params if isinstance(one.type, click.Path)]
    assert len(paths) > 20
    assert [(name, one.name) for name, one in paths if isinstance(one.type, click.Path) and one.type.readable] == []
