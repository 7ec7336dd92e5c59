"""The command that measures the machine at hand."""

from __future__ import annotations

from pathlib import Path

import click

from shardmerge.cli.options import PATH, dumped, json_option


@click.command()
@click.option("--size", default="2GiB", help="Of the fp32 checkpoint; the disk must hold it twice. Default: 2GiB.")
@click.option("--scratch", type=PATH, default=".", help="A directory on the disk to measure. Default: here.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, help="Runs of each contender. Default: 3.")
@json_option
def bench(size: str, scratch: str, rounds: int, as_json: bool) -> None:
    """Measure conversions on this machine and disk, beside the least they could cost.

    Writes a checkpoint, casts it to bf16, renames its tensors, and lets `dd` move the same bytes in turn. Everything is
    removed afterwards.
    """
    # Nobody else needs these, and they are slow to import.
    from shardmerge.api import parse_size
    from shardmerge.bench import suite, table

    place = Path(scratch).expanduser().absolute()
    found = suite.bench(parse_size(size, binary=True), place, rounds, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(dumped(found))
        return
    for line in table.lines(found):
        click.echo(line)
