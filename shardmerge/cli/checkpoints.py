"""The commands that look at checkpoints and compare them, or attest what they found."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import shardmerge
from shardmerge.cli import colour
from shardmerge.cli.options import (
    PATH,
    closeness_options,
    dumped,
    json_option,
    parsed,
    plan_options,
    quiet_option,
    refuse_idle,
    state_root_option,
    view_option,
    write_lines,
)
from shardmerge.cli.progress import planning, progress_bar

if TYPE_CHECKING:
    from shardmerge import Closeness, Comparison, Difference


def add_checkpoint_commands(group: click.Group) -> None:
    """Puts the commands of this module on the group."""
    for command in (inspect, verify, diff, attest):
        group.add_command(command)


@click.command()
@click.argument("source", type=PATH)
@click.argument("template", nargs=-1, metavar="[TEMPLATE]...")
@click.option("--flat", is_flag=True, help="A line for every tensor, with the place where it was found.")
@view_option
@state_root_option
@click.option("--download", is_flag=True, help="Fetch a hub id that is not in the local cache.")
@quiet_option
@json_option
def inspect(
    source: str,
    template: tuple[str, ...],
    flat: bool,
    quiet: bool,
    as_json: bool,
    **opening: Any,  # noqa: ANN401
) -> None:
    """Show what a checkpoint holds, from its headers alone; of a TEMPLATE as mappings have it, the names it matches."""
    if as_json:
        refuse_idle({"flat": flat}, "flat", why="is for people: --json lists every tensor")
    with planning(Path(source).name, quiet=quiet or as_json, phase="reading headers"):
        catalog = shardmerge.inspect(source, **opening)
    from shardmerge.plan import catalog_text

    names, layout = shardmerge.matching(catalog, template), shardmerge.layout_of(catalog)
    if as_json:
        write_lines(catalog_text.catalog_json(catalog, layout, names))
    elif flat:
        colour.echo(catalog_text.catalog_table(catalog, layout, names))
    else:
        colour.echo(catalog_text.catalog_text(catalog, layout, names, colour.columns()))


@click.command()
@click.argument("directory", type=PATH)
@click.option(
    "--sources",
    type=PATH,
    metavar="MAPPING",
    help="Make every tensor again and compare the bits.",
)
@click.option("--reference", type=PATH, metavar="PATH", help="Compare with another checkpoint.")
@closeness_options
@click.option(
    "--tensor", "tensors", multiple=True, metavar="NAME", help="Read only this tensor, or those of a template."
)
@click.option("--sample", default="", metavar="N|P%", help="Read only so many tensors, or a share of them.")
@click.option("--seed", type=int, default=0, help="Of the sample: another one draws other tensors. Default: 0.")
@click.option("--load", is_flag=True, help="Load it with the installed transformers, in a child process.")
@plan_options
@quiet_option
@json_option
def verify(  # one parameter an option
    directory: str,
    sources: str | None,
    reference: str | None,
    load: bool,
    quiet: bool,
    as_json: bool,
    **given: Any,  # noqa: ANN401
) -> None:
    """Check a finished DIRECTORY: receipt, checksums, the reference reader; and what the options ask for."""
    if sources is None:
        why = "is for --sources MAPPING, which makes the tensors again"
        refuse_idle(given, "dtype", "shard_size", "form", "dcp_root", why=why)
    which = _selection(given, whole=reference is not None or load)
    how = _closeness(given, reference)
    name, size = Path(directory).name, _size_of(directory) * (1 + (sources is not None) + (reference is not None))
    with progress_bar(size, quiet=quiet or as_json, label=name, phase="verifying") as progress:
        verdict = shardmerge.verify(
            directory,
            sources=sources,
            reference=reference,
            how=how,
            load=load,
            **which,
            options=parsed(given),
            progress=progress,
        )
    if as_json:
        lists = {name: list(getattr(verdict, name)) for name in ("checks", "unchecked", "unlisted")}
        click.echo(dumped({"ok": True, **lists, "tensors": verdict.tensors}))
        return
    from shardmerge.cli import tables

    for check in verdict.checks:
        tables.write(f"ok  {check}")
    for rest in verdict.unchecked:
        tables.write(f"not checked  {rest}")
    for name in verdict.unlisted:
        tables.write(f"not listed  {name}: the receipt does not name it")
    if verdict.unchecked and not (which["tensors"] or which["sample"]):
        colour.echo("hint: --sources MAPPING makes every tensor again and compares all bytes", err=True)


@click.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@closeness_options
@click.option("--limit", type=click.IntRange(0), metavar="N", help="How many differences to show. Default: 20.")
@click.option("--all", "every", is_flag=True, help="Show all differences.")
@quiet_option
@json_option
def diff(
    a: str,
    b: str,
    limit: int | None,
    every: bool,
    quiet: bool,
    as_json: bool,
    **given: Any,  # noqa: ANN401
) -> NoReturn:
    """Compare two checkpoints of any format: names, types, shapes, values. Exit code 3 if they differ.

    A or B may be a mapping.yaml: its tensors are made as they are compared, and never written.
    """
    from shardmerge.api import sides
    from shardmerge.cli import tables

    _refuse_two_limits(limit, every, as_json)
    how = shardmerge.Closeness(**given)
    with planning(f"{Path(a).name} and {Path(b).name}", quiet=quiet or as_json, phase="reading headers"):
        both = sides(a, b, how)
    with progress_bar(both.nbytes, quiet=quiet or as_json, label=Path(a).name, phase="comparing") as progress:
        found = both.compare(progress)
    if as_json:
        click.echo(dumped(_comparison_json(found)))
    else:
        most = len(found) if every else 20 if limit is None else limit
        for one in found.differences[:most]:
            tables.write(f"{one.name}: {one.what}: {one.detail}")
        if len(found) > most:
            click.echo(f"... and {len(found) - most:,} more; --all shows them")
        colour.echo(f"{found.summary}; values were not compared" if how.headers else found.summary)
    sys.exit(3 if found else 0)


def _refuse_two_limits(limit: int | None, every: bool, as_json: bool) -> None:
    given = {"limit": limit is not None, "all": every}
    if as_json:
        refuse_idle(given, "limit", "all", why="is for people: --json lists all differences")
    if every:
        refuse_idle(given, "limit", why="and --all contradict each other")


def _comparison_json(found: Comparison) -> dict[str, object]:
    rows = [{"name": d.name, "what": d.what, "detail": d.detail, **_numbers(d)} for d in found]
    counts = {what.replace(" ", "_").lower(): count for what, count in found.counts.items()}
    return {"equal": not rows, "counts": counts, "differences": rows}


def _numbers(one: Difference) -> dict[str, object]:
    if one.distance is not None:
        return asdict(one.distance)
    return {"after_cast": one.after_cast or None} if one.what == "dtype" else {}


def _closeness(given: dict[str, Any], reference: str | None) -> Closeness:
    """Takes what counts as equal out of the options."""
    own = {name: given.pop(name) for name in ("rtol", "atol", "cast", "headers")}
    if reference is None:
        refuse_idle(own, *own, why="is for --reference PATH, which compares values")
    return shardmerge.Closeness(**own)


@click.command()
@click.argument("directory", type=PATH)
@click.option("-o", "--out", type=PATH, metavar="FILE", help="Default: DIRECTORY.intoto.json, beside it.")
@click.option(
    "--mapping",
    type=PATH,
    metavar="MAPPING",
    help="Of the run: its digest goes into the statement.",
)
@plan_options
@quiet_option
@json_option
def attest(
    directory: str,
    out: str | None,
    mapping: str | None,
    quiet: bool,
    as_json: bool,
    **given: Any,  # noqa: ANN401
) -> None:
    """Verify a published DIRECTORY and write an in-toto statement: SHA-256 of all files, and what made them."""
    if mapping is None:
        why = "is for --mapping MAPPING, which is planned again"
        refuse_idle(given, "dtype", "shard_size", "form", "dcp_root", "files", "partial", why=why)
    name = Path(directory).name
    with progress_bar(_size_of(directory), quiet=quiet or as_json, label=name, phase="verifying") as progress:
        path, verdict = shardmerge.attest(directory, out, mapping=mapping, options=parsed(given), progress=progress)
    if as_json:
        click.echo(dumped({"path": str(path), "unchecked": list(verdict.unchecked)}))
        return
    for rest in verdict.unchecked:
        click.echo(f"not checked  {rest}", err=True)
    click.echo(f"written: {path}")


def _selection(given: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """Takes which tensors are read out of the options."""
    own = {name: given.pop(name) for name in ("tensors", "sample", "seed")}
    if not own["sample"]:
        refuse_idle(own, "seed", why="is for --sample, which draws tensors")
    if whole:
        why = "selects tensors, and --reference and --load compare the whole model"
        refuse_idle({"tensor": own["tensors"], **own}, "tensor", "sample", why=why)
    return own


def _size_of(directory: str) -> int:
    folder = Path(directory)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
