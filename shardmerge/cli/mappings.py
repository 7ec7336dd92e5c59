"""Commands that help to write a mapping, and to understand one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from shardmerge.cli import colour
from shardmerge.cli.completing import complete_source, complete_target
from shardmerge.cli.options import PATH, dumped, json_option, pair, parsed, plan_options


def add_commands(group: click.Group) -> None:
    """Puts the commands of this module on the group."""
    for command in (explain, init, invert, schema):
        group.add_command(command)


@click.command()
@click.argument("mapping", type=PATH)
@click.option("--tensor", required=True, metavar="NAME", help="A tensor of the result.")
@plan_options
@json_option
def explain(mapping: str, tensor: str, as_json: bool, **given: Any) -> None:  # noqa: ANN401
    """Tell the whole story of one tensor: its rule, what it is made of, files and bytes, memory, where it goes."""
    from shardmerge import api

    if as_json:
        click.echo(dumped(api.explain_json(Path(mapping), tensor, parsed(given))))
    else:
        colour.echo(api.explain_text(Path(mapping), tensor, parsed(given)))


@click.command()
@click.argument("mapping", type=PATH)
@click.option("--source", default="", metavar="NAME", help="The source to get back. Default: the first.")
@click.option("-o", "--out", type=PATH, help="Write to a file that is not there yet, instead of stdout.")
def invert(mapping: str, source: str, out: str | None) -> None:
    """Write the mapping that leads back, or say which rules have no way back and why."""
    from shardmerge import api

    _write(api.invert(Path(mapping), source), out)


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option(
    "--base",
    "bases",
    multiple=True,
    metavar="NAME=PATH",
    shell_complete=complete_source,
    help="Another source of the preset.",
)
@click.option(
    "--to",
    default="",
    metavar="TARGET",
    shell_complete=complete_target,
    help="What is wanted: hf/llava, torchtune, or a preset.",
)
@click.option("-o", "--out", type=PATH, help="Write to a file that is not there yet, instead of stdout.")
@click.option("--download", is_flag=True, help="Fetch hub ids that are not in the local cache.")
def init(checkpoint: str, bases: tuple[str, ...], to: str, out: str | None, download: bool) -> None:
    """Write a mapping to begin with: recognise the layout of CHECKPOINT, choose the preset, name what is missing.

    A configuration of mergekit (merge.yml) becomes the mapping that makes the same model.
    """
    from shardmerge import api

    named = dict(pair(text) for text in bases)
    proposal = api.init(checkpoint, bases=named, to=to, mapping=out, download=download)
    _write(proposal.text, out)
    for note in proposal.notes:
        colour.echo(f"note: {note}", err=True)


@click.command()
@click.option("--preset", is_flag=True, help="Of a preset's file instead.")
def schema(preset: bool) -> None:
    """Print the JSON Schema of mapping.yaml, for editors."""
    from shardmerge import api

    click.echo(json.dumps(api.schema(preset=preset), indent=2))


def _write(text: str, out: str | None) -> None:
    from shardmerge import api

    if out is None:
        click.echo(text, nl=False)
        return
    api.write_new(Path(out), text)
    click.echo(f"written: {out}", err=True)
