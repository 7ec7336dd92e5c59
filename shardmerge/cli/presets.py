"""The commands that show presets."""

from __future__ import annotations

import click

import shardmerge
from shardmerge.cli.completing import complete_preset
from shardmerge.cli.options import dumped, json_option


@click.group()
def presets() -> None:
    """Mappings that come with shardmerge."""


@presets.command("list")
@json_option
def presets_list(as_json: bool) -> None:
    """Name every preset with its title."""
    found = shardmerge.presets()
    if as_json:
        click.echo(dumped({"presets": [{"name": preset.name, "title": preset.title} for preset in found]}))
        return
    for preset in found:
        click.echo(f"{preset.name}  {preset.title}")


@presets.command("show")
@click.argument("name", shell_complete=complete_preset)
def presets_show(name: str) -> None:
    """Print a preset as it is written, to read or to copy from."""
    from shardmerge import api

    click.echo(api.preset_text(name), nl=False)
