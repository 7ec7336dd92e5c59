"""Commands for plans that several processes make: on many nodes, in a batch system, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import shardmerge
from shardmerge.cli.options import (
    PATH,
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
@click.argument("mapping", type=PATH)
@click.option("-o", "--out", type=PATH, help="Output directory, instead of the mapping's.")
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
@click.argument("out", type=PATH)
def clean(out: str) -> None:
    """Remove what unfinished runs left beside the output path OUT."""
    found = shardmerge.clean(out)
    for path in found:
        click.echo(f"removed: {path}")
    if not found:
        click.echo("nothing is left over")


@click.command()
@click.argument("mapping", type=PATH)
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS OF RUN]")
@click.option("--nodes", type=click.IntRange(1, 10_000), required=True, help="How many tasks, a node each.")
@click.option("--cpus", type=click.IntRange(1, 1024), default=4, help="CPUs of each task. Default: 4.")
@click.option("--mem", default="2G", help="Memory of each task. Default: 2G.")
@click.option("--time", "limit", default="01:00:00", help="Time limit of a task. Default: one hour.")
@click.option("--sbatch", "lines", multiple=True, metavar="OPTION", help="Another option of sbatch: partition=long.")
@click.option("-o", "--out", type=PATH, help="Output directory, instead of the mapping's.")
@click.pass_context
def slurm(  # noqa: PLR0913  # one parameter an option
    context: click.Context,
    mapping: str,
    more: tuple[str, ...],
    nodes: int,
    cpus: int,
    mem: str,
    limit: str,
    lines: tuple[str, ...],
    out: str | None,
) -> None:
    """Print the sbatch script that makes a mapping, or a plan, by an array of tasks."""
    if not Path(mapping).is_file():
        from shardmerge.errors import UsageError

        raise UsageError("missing-path", "there is no such mapping or plan", where=mapping)
    arguments = ["run", _absolute(mapping), "--part", "any", *(["--out", _absolute(out)] if out else []), *more]
    _try(context, mapping, arguments)
    told = {"array": f"0-{nodes - 1}", "cpus-per-task": cpus, "mem": mem, "time": limit}
    options = [*(f"--{name}={value}" for name, value in told.items()), *_FIXED, *map(_dashed, lines)]
    remark = [] if mapping.endswith(".json") else [_PLANS_ANEW]
    head = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]
    click.echo("\n".join([*head, *remark, _command(arguments)]))


# What every array of tasks is told. A task that is preempted is queued again, and goes on; its log is added to.
# SIGUSR1 comes a minute before the time limit, or up to one more earlier (man sbatch): a task that gets it stops
# cleanly. It goes to the shell of the script alone (B:), in whose place `exec` puts shardmerge.
_FIXED = (
    "--job-name=shardmerge",
    "--nodes=1",
    "--ntasks=1",
    "--requeue",
    "--open-mode=append",
    "--output=shardmerge-%A_%a.log",
    "--signal=B:USR1@60",
)


_PLANS_ANEW = (
    "# Each task plans anew. For many or large files: shardmerge plan MAPPING --out plan.json, then slurm plan.json"
)


def _absolute(path: str) -> str:
    """A task may begin in another directory."""
    return str(Path(path).expanduser().absolute())


def _dashed(option: str) -> str:
    return option if option.startswith("-") else f"--{option}"


def _try(context: click.Context, mapping: str, arguments: list[str]) -> None:
    """Refuses what `run` would refuse, before anybody waits for it in a queue."""
    group = context.parent.command if context.parent else None
    if isinstance(group, click.Group):
        called = group.commands["run"].make_context("run", arguments[1:], parent=context.parent)
        refuse_idle_for_plan(mapping, called.params)


def _command(arguments: list[str]) -> str:
    """Returns the line that calls this shardmerge, whatever PATH holds where the task runs."""
    import shlex
    import shutil
    import sys

    called = shutil.which(sys.argv[0])
    itself = [str(Path(called).absolute())] if called else [sys.executable, "-m", "shardmerge"]
    return f"exec {shlex.join([*itself, *arguments])}"


def show_part(state: Result | Unfinished, *, as_json: bool) -> None:
    """Says what one of several did, or that the result is published."""
    from shardmerge.api import Unfinished

    if isinstance(state, Unfinished):
        fields: dict[str, object] = {"published": False, "made": state.made, "missing": state.missing}
        there = state.count - state.missing
        said = f"made {state.made} files; {there} of {state.count} are there, the others are made by other tasks"
        if state.elsewhere:
            said = f"made {state.made} files; all {state.count} are there, and another task publishes them"
    else:
        fields = {"published": True, "made": state.made, "path": str(state.path), "plan": state.plan.id}
        said = f"made {state.made} files; all {len(state.plan.shards)} are there: {state.path} is published"
    click.echo(dumped({"ok": True, **fields}) if as_json else said)


def say_waiting(missing: int) -> None:
    """Says what a task does that has nothing to do."""
    what = f"waiting for {missing} files that other tasks are at work on" if missing else "waiting for the result"
    click.echo(what, err=True)
