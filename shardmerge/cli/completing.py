"""Completion in shells: what may follow, and the command that prints the script for a shell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# A source's name ends in `=`, and its path follows without a space.
_ADDED = "COMPREPLY+=($value)"
_WITHOUT_SPACE = f"{_ADDED}\n            [[ $value == *= ]] && compopt -o nospace"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a SHELL, for its start-up file."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(click.get_current_context().find_root().command, {}, "shardmerge", "_SHARDMERGE_COMPLETE")
    click.echo(script.source().replace(_ADDED, _WITHOUT_SPACE))


def complete_preset(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """Returns presets."""
    import shardmerge

    return _items(((one.name, one.title) for one in shardmerge.presets()), text)


def complete_target(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """Returns what a preset makes, and presets."""
    import shardmerge

    found = shardmerge.presets()
    made = {one.target.name: "" for one in found if one.target}
    return _items((*made.items(), *((one.name, one.title) for one in found)), text)


def complete_source(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """Returns ``NAME=`` for the sources of the preset that ``--use`` names, or of every preset."""
    import shardmerge

    use = context.params.get("use")
    found = [one for one in shardmerge.presets() if not use or one.name == use]
    roles = {name: role.about for one in found for name, role in one.roles.items()}
    return _items(((f"{name}=", about) for name, about in roles.items()), text)


def complete_dtype(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """Returns float types."""
    from shardmerge.dtypes import FLOAT_SPELLINGS

    return _items(((name, "") for name in FLOAT_SPELLINGS), text)


def complete_code(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """Returns error codes."""
    from shardmerge.cli.error_codes import error_codes

    return _items(((one.code, one.about) for one in error_codes().values()), text)


def _items(found: Iterable[tuple[str, str]], text: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(name, help=about or None) for name, about in found if name.startswith(text)]
