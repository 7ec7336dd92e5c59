"""Commands for plans that several processes make: on many nodes, in a batch system, one after the other."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import shardmerge
from shardmerge.cli.options import (
    dumped,
    json_option,
    pair,
    parsed,
    plan_options,
    refuse_idle,
    refuse_idle_for_plan,
    root_option,
    run_options,
)

if TYPE_CHECKING:
    from shardmerge.api import Result, Unfinished


def add_cluster_commands(group: click.Group) -> None:
    """Puts the commands of this module on the group."""
    for command in (finish, clean, slurm):
        group.add_command(command)


@click.command()
@click.argument("mapping", type=click.Path())
@click.option("-o", "--out", type=click.Path(), help="Output directory, instead of the mapping's.")
@root_option
@plan_options
@run_options
@json_option
def finish(mapping: str, out: str | None, roots: tuple[str, ...], as_json: bool, **given: Any) -> None:  # noqa: ANN401
    """Publish a result whose files were all made by `run --part`."""
    from shardmerge import api

    refuse_idle_for_plan(mapping, given)
    refuse_idle(given, "fresh", why="is for whoever makes the files")
    moved = [pair(text, "--root", "/old=/new") for text in roots]
    show_part(api.finish(mapping, out, parsed(given), moved), as_json=as_json)


@click.command()
@click.argument("out", type=click.Path())
def clean(out: str) -> None:
    """Remove what unfinished runs left beside the output path OUT."""
    found = shardmerge.clean(out)
    for path in found:
        click.echo(f"removed: {path}")
    if not found:
        click.echo("nothing is left over")


@click.command()
@click.argument("mapping", type=click.Path())
@click.option("--nodes", type=click.IntRange(1, 10_000), required=True, help="How many tasks, a node each.")
@click.option("--cpus", type=click.IntRange(1, 1024), default=4, help="CPUs of each task. Default: 4.")
@click.option("--mem", default="2G", help="Memory of each task. Default: 2G.")
@click.option("--time", "limit", default="01:00:00", help="Time limit of a task. Default: one hour.")
@click.option("-o", "--out", type=click.Path(), help="Output directory, instead of the mapping's.")
def slurm(mapping: str, nodes: int, cpus: int, mem: str, limit: str, out: str | None) -> None:
    """Print the sbatch script that makes a mapping, or a plan, by an array of tasks."""
    if not Path(mapping).is_file():
        from shardmerge.errors import UsageError

        raise UsageError("missing-path", "there is no such mapping or plan", where=mapping)
    place = f" --out {shlex.quote(str(Path(out).absolute()))}" if out else ""
    click.echo(_SCRIPT.format(last=nodes - 1, cpus=cpus, mem=mem, limit=limit, mapping=_quoted(mapping), out=place))


def _quoted(mapping: str) -> str:
    return shlex.quote(str(Path(mapping).absolute()))


# A task takes whatever nobody has made, so that one that is preempted, or slow, is made up for; requeued, it goes on.
# SIGUSR1 comes a minute before the time limit: the task stops cleanly, and says how to go on.
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=shardmerge
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem={mem}
#SBATCH --time={limit}
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
exec shardmerge run {mapping} --part any{out}
"""


def show_part(state: Result | Unfinished, *, as_json: bool) -> None:
    """Says what one of several did, or that the result is published."""
    from shardmerge.api import Unfinished

    if isinstance(state, Unfinished):
        fields: dict[str, object] = {"published": False, "made": state.made, "missing": state.missing}
        there = state.count - state.missing
        said = f"made {state.made} files; {there} of {state.count} are there, the others are made by other tasks"
    else:
        fields = {"published": True, "made": state.made, "path": str(state.path), "plan": state.plan.id}
        said = f"made {state.made} files; all {len(state.plan.shards)} are there: {state.path} is published"
    click.echo(dumped({"ok": True, **fields}) if as_json else said)
