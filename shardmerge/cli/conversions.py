"""The commands that plan, and carry out."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardmerge.cli import colour
from shardmerge.cli.cluster import say_waiting, show_part
from shardmerge.cli.completing import complete_preset, complete_source
from shardmerge.cli.options import (
    PATH,
    Reporting,
    check_option,
    command_line,
    config_option,
    device_option,
    dumped,
    engine_options,
    json_option,
    log_json_option,
    pair,
    parsed,
    plan_options,
    quiet_option,
    refuse_idle,
    refuse_idle_for_engine,
    refuse_idle_for_plan,
    root_option,
    run_options,
    save_mapping_option,
    state_root_option,
    strip_option,
    verbose_option,
    view_option,
    write_lines,
)
from shardmerge.cli.progress import planning, progress_bar, warn
from shardmerge.cli.report import RunReport, asked_report, refuse_report, report_option

if TYPE_CHECKING:
    from shardmerge.api import Options, Prepared, SavedMapping

_out = click.option("-o", "--out", type=PATH, help="Output directory, instead of the mapping's.")
_use = click.option(
    "--use",
    default="",
    metavar="PRESET",
    shell_complete=complete_preset,
    help="A preset, see `shardmerge presets list`.",
)
_base = click.option(
    "--base",
    "bases",
    multiple=True,
    metavar="NAME=PATH",
    shell_complete=complete_source,
    help="Another source of the preset.",
)
_let = click.option("--let", "lets", multiple=True, metavar="NAME=VALUE", help="A number of the preset: ranks=8.")


def add_conversion_commands(group: click.Group) -> None:
    """Puts the commands of this module on the group."""
    for command in (run, plan, convert):
        group.add_command(command)


@click.command()
@click.argument("mapping", type=PATH)
@_out
@root_option
@plan_options
@check_option
@device_option
@run_options
@engine_options
@click.option("--part", metavar="I/N|any", help="Make a share of the files, as one of several that do: 0/8, or any.")
@report_option
@quiet_option
@verbose_option
@log_json_option
@json_option
def run(  # noqa: PLR0913  # one parameter an option
    mapping: str,
    out: str | None,
    roots: tuple[str, ...],
    part: str | None,
    quiet: bool,
    verbose: bool,
    log_json: bool,
    as_json: bool,
    **given: Any,  # noqa: ANN401
) -> None:
    """Carry out a mapping.yaml, or a plan, and publish the result, whole or not at all.

    Run again after it was stopped, it goes on where it was.
    """
    from shardmerge import api

    options, reporting = parsed(given), Reporting.of(quiet, verbose, log_json, as_json)
    refuse_idle_for_plan(mapping, given)
    refuse_idle_for_engine(given, part)
    moved = [pair(text, "--root", "/old=/new") for text in roots]
    if part is not None:
        refuse_idle(given, "fresh", why="would remove what others have made: `shardmerge clean OUT` does, before all")
        told = {"log_json": log_json, "verbose": verbose}
        refuse_idle(told, *told, why="is for a whole run: a share tells no progress")
        refuse_report(given, "is for a whole run: `shardmerge report OUT` makes one of its result")
        state = api.run_part(mapping, part, out, options, roots=moved, waiting=None if quiet else say_waiting)
        show_part(state, as_json=as_json)
        return
    report = asked_report(given)
    with planning(mapping, quiet=reporting.silent, machine=log_json):
        prepared = api.prepare(Path(mapping), options, moved)
    path = api.output_path(prepared, out, mapping)
    _carry_out(prepared, path, options, reporting, report)


@click.command()
@click.argument("mapping", type=PATH)
@click.option(
    "-o",
    "--out",
    type=PATH,
    metavar="FILE",
    help="Write the plan, for `run` to carry out: plan.json.",
)
@root_option
@plan_options
@check_option
@click.option("--tensors", is_flag=True, help="One line a tensor: where it comes from and why.")
@json_option
def plan(  # one parameter an option
    mapping: str,
    out: str | None,
    roots: tuple[str, ...],
    tensors: bool,
    as_json: bool,
    **given: Any,  # noqa: ANN401
) -> None:
    """Show what `run` would do: sources, every tensor, bytes, memory. Reads headers only."""
    from shardmerge import api

    refuse_idle_for_plan(mapping, given)
    with planning(mapping, quiet=as_json):
        prepared = api.prepare(Path(mapping), parsed(given), [pair(text, "--root", "/old=/new") for text in roots])
    if out is not None:
        api.write_plan(prepared, Path(out))
    _show_plan(prepared, prepared.out, tensors=tensors, as_json=as_json)
    if out is not None:
        click.echo(f"written: {out}; to carry it out: shardmerge run {out}", err=True)


@click.command()
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@_use
@_base
@_let
@view_option
@state_root_option
@strip_option
@config_option
@save_mapping_option
@plan_options
@check_option
@device_option
@run_options
@click.option("--with-optimizer", is_flag=True, help="Take Adam's state along, to --format dcp or zero-universal.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@report_option
@quiet_option
@verbose_option
@log_json_option
@json_option
def convert(  # noqa: PLR0913  # one parameter an option
    source: str,
    out: str,
    use: str,
    bases: tuple[str, ...],
    lets: tuple[str, ...],
    view: Any,  # noqa: ANN401  # click's Choice
    root: str,
    strip: tuple[str, ...],
    config: str,
    save_mapping: str | None,
    dry_run: bool,
    quiet: bool,
    verbose: bool,
    log_json: bool,
    as_json: bool,
    **given: Any,  # noqa: ANN401
) -> None:
    """Convert a checkpoint SOURCE to the directory OUT; replaces zero_to_fp32.py.

    Without --use every tensor keeps its name.
    """
    from shardmerge import api

    options, reporting = parsed(given), Reporting.of(quiet, verbose, log_json, as_json)
    named = dict(pair(text) for text in bases)
    let = dict(pair(text, "--let", "ranks=8") for text in lets)
    if dry_run:
        refuse_report(given, "is for a run, and --dry-run makes none")
    report = asked_report(given)
    with planning(source, quiet=reporting.silent, machine=log_json):
        prepared = api.prepare_conversion(
            source,
            use=use,
            bases=named,
            let=let,
            view=view,
            root=root,
            strip=strip,
            config=config,
            options=options,
            saved=_saved(save_mapping, out),
        )
    if save_mapping is not None:
        click.echo(f"written: {save_mapping}; to make the same result: shardmerge run {save_mapping}", err=True)
    if dry_run:
        _show_plan(prepared, Path(out), tensors=False, as_json=as_json)
        return
    path = Path(out).expanduser().absolute()
    _carry_out(prepared, path, options, reporting, report)


def _saved(path: str | None, out: str) -> SavedMapping | None:
    if path is None:
        return None
    from shardmerge.api import SavedMapping

    return SavedMapping(Path(path), Path(out), command_line(click.get_current_context(), "save_mapping", "dry_run"))


def _show_plan(prepared: Prepared, out: Path | None, *, tensors: bool, as_json: bool) -> None:
    from shardmerge import api
    from shardmerge.plan import explain

    _warn(prepared)
    cloned = 0 if out is None or tensors else api.clonable_bytes(prepared.plan, out.expanduser())
    if as_json:
        write_lines(explain.plan_json(prepared.plan, prepared.how, cloned))
    elif tensors:
        for line in explain.tensor_lines(prepared.plan):
            click.echo(line)
    else:
        _print_plan(prepared, out, cloned)


def _print_plan(prepared: Prepared, out: Path | None, cloned: int = 0) -> None:
    from shardmerge.cli.outcomes import shown_path
    from shardmerge.cli.tables import show
    from shardmerge.plan import explain

    place = shown_path(out) if out else "(no output path)"
    show(explain.plan_blocks(prepared.plan, prepared.how, place, cloned))


def _warn(prepared: Prepared, *, machine: bool = False) -> None:
    for warning in prepared.plan.warnings:
        warn(warning, machine=machine)


def _carry_out(prepared: Prepared, out: Path, options: Options, reporting: Reporting, report: RunReport | None) -> None:
    from shardmerge import api
    from shardmerge.cli import outcomes

    _begin(prepared, out, reporting)
    if report:
        report.begin(prepared, out)
    started = time.monotonic()
    total = sum(tensor.nbytes for tensor in prepared.plan.tensors())
    after, machine = "syncing" if options.sync else "", reporting.log_json
    with progress_bar(total, quiet=reporting.silent, label=out.name, machine=machine, after=after) as progress:
        publishing = partial(progress.begin, "publishing") if progress else bool
        result = api.carry_out(prepared, out, options, report.watching(progress) if report else progress, publishing)
    seconds = time.monotonic() - started
    written = report.write(result, prepared) if report else None
    if reporting.as_json:
        more = {"report": str(written)} if written else {}
        click.echo(dumped(outcomes.result_json(result, prepared, seconds) | more))
        return
    for text in outcomes.doubts(result, options):
        warn(text, machine=machine)
    if not reporting.quiet:
        colour.echo("\n".join(outcomes.summary(result, prepared, options, seconds)))
        if written:
            click.echo(f"report  {written}")


def _begin(prepared: Prepared, out: Path, reporting: Reporting) -> None:
    from shardmerge import api
    from shardmerge.cli import outcomes

    _warn(prepared, machine=reporting.log_json)
    if reporting.verbose:
        _print_plan(prepared, out, api.clonable_bytes(prepared.plan, out))
        colour.echo("")
    elif not (reporting.silent or reporting.log_json):
        colour.echo(outcomes.intention(prepared, out), err=True)
