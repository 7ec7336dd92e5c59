"""The commands. stdout is the answer, stderr is progress, warnings and errors."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

import shardmerge
from shardmerge.cli.bench import bench
from shardmerge.cli.cluster import add_cluster_commands, say_waiting, show_part
from shardmerge.cli.mappings import add_commands
from shardmerge.cli.options import (
    check_option,
    device_option,
    dumped,
    engine_options,
    json_option,
    pair,
    parsed,
    plan_options,
    refuse_idle,
    refuse_idle_for_engine,
    refuse_idle_for_plan,
    root_option,
    run_options,
    write_lines,
)
from shardmerge.cli.progress import planning, progress_bar, warn
from shardmerge.errors import InterruptedRunError, PublishedError, ResourceError, ShardmergeError, UsageError

if TYPE_CHECKING:
    from shardmerge.api import Options, Prepared, Result

_INTERNAL_ERROR = 70


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(shardmerge.__version__, prog_name="shardmerge")
def cli() -> None:
    """Turns training checkpoints into Hugging Face models, tensor by tensor, in a few dozen MB of memory.

    \b
    shardmerge run mapping.yaml                      what the mapping says
    shardmerge plan mapping.yaml                     all of it, without reading data
    shardmerge convert global_step500/ out/ --dtype bfloat16
    shardmerge inspect work_dirs/iter_5198.pth
    """  # noqa: D301  # \b is click's mark for "leave these lines as they are"


_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress bar, no summary.")
_log_json = click.option("--log-json", is_flag=True, help="Progress as lines of JSON on stderr, for machines.")
_out = click.option("-o", "--out", type=click.Path(), help="Output directory, instead of the mapping's.")
_use = click.option("--use", default="", metavar="PRESET", help="A preset, see `shardmerge presets list`.")
_base = click.option("--base", "bases", multiple=True, metavar="NAME=PATH", help="Another source of the preset.")
_let = click.option("--let", "lets", multiple=True, metavar="NAME=VALUE", help="A number of the preset: ranks=8.")
_view = click.option(
    "--view",
    type=click.Choice(["fp32", "module"]),
    default="fp32",
    help="DeepSpeed: master weights or 16-bit.",
)
_root = click.option("--root", default="", help="Dotted path of the state dict inside a torch file.")


@cli.command()
@click.argument("mapping", type=click.Path())
@_out
@root_option
@plan_options
@check_option
@device_option
@run_options
@engine_options
@click.option("--part", metavar="I/N|any", help="Make a share of the files, as one of several that do: 0/8, or any.")
@_quiet
@_log_json
@json_option
def run(  # one parameter an option
    mapping: str,
    out: str | None,
    roots: tuple[str, ...],
    part: str | None,
    quiet: bool,
    log_json: bool,
    as_json: bool,
    **given: Any,  # noqa: ANN401
) -> None:
    """Carry out a mapping.yaml, or a plan, and publish the result, whole or not at all.

    Run again after it was stopped, it goes on where it was.
    """
    from shardmerge import api

    options = parsed(given)
    refuse_idle_for_plan(mapping, given)
    refuse_idle_for_engine(given, part)
    moved = [pair(text, "--root", "/old=/new") for text in roots]
    if part is not None:
        refuse_idle(given, "fresh", why="would remove what others have made: `shardmerge clean OUT` does, before all")
        refuse_idle({"log_json": log_json}, "log_json", why="is for a whole run: a share tells no progress")
        state = api.run_part(mapping, part, out, options, roots=moved, waiting=None if quiet else say_waiting)
        show_part(state, as_json=as_json)
        return
    with planning(mapping, quiet=quiet or as_json, machine=log_json):
        prepared = api.prepare(Path(mapping), options, moved)
    path = api.output_path(prepared, out, mapping)
    _carry_out(prepared, path, options, quiet=quiet, as_json=as_json, log_json=log_json)


@cli.command()
@click.argument("mapping", type=click.Path())
@click.option(
    "-o", "--out", type=click.Path(), metavar="FILE", help="Write the plan, for `run` to carry out: plan.json."
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


@cli.command()
@click.argument("source", type=click.Path())
@click.argument("out", type=click.Path())
@_use
@_base
@_let
@_view
@_root
@plan_options
@check_option
@device_option
@run_options
@click.option("--with-optimizer", is_flag=True, help="Take Adam's state along, to --format dcp or zero-universal.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@_quiet
@_log_json
@json_option
def convert(  # noqa: PLR0913  # one parameter an option
    source: str,
    out: str,
    use: str,
    bases: tuple[str, ...],
    lets: tuple[str, ...],
    view: Any,  # noqa: ANN401  # click's Choice
    root: str,
    dry_run: bool,
    quiet: bool,
    log_json: bool,
    as_json: bool,
    **given: Any,  # noqa: ANN401
) -> None:
    """Convert a checkpoint SOURCE to the directory OUT; replaces zero_to_fp32.py.

    Without --use every tensor keeps its name.
    """
    from shardmerge import api

    options = parsed(given)
    named = dict(pair(text) for text in bases)
    let = dict(pair(text, "--let", "ranks=8") for text in lets)
    with planning(source, quiet=quiet or as_json, machine=log_json):
        prepared = api.prepare_conversion(source, use=use, bases=named, let=let, view=view, root=root, options=options)
    if dry_run:
        _show_plan(prepared, Path(out), tensors=False, as_json=as_json)
        return
    path = Path(out).expanduser().absolute()
    _carry_out(prepared, path, options, quiet=quiet, as_json=as_json, log_json=log_json)


@cli.command()
@click.argument("source", type=click.Path())
@_view
@_root
@click.option("--download", is_flag=True, help="Fetch a hub id that is not in the local cache.")
@json_option
def inspect(source: str, view: Any, root: str, download: bool, as_json: bool) -> None:  # noqa: ANN401
    """List what a checkpoint holds, from its headers alone."""
    from shardmerge.plan import explain

    catalog = shardmerge.inspect(source, view=view, root=root, download=download)
    if as_json:
        write_lines(explain.catalog_json(catalog, shardmerge.layout_of(catalog)))
    else:
        click.echo(explain.catalog_text(catalog, shardmerge.layout_of(catalog)))


@cli.command()
@click.argument("directory", type=click.Path())
@click.option("--sources", type=click.Path(), metavar="MAPPING", help="Make every tensor again and compare the bits.")
@click.option("--reference", type=click.Path(), metavar="PATH", help="Compare with another checkpoint.")
@click.option("--load", is_flag=True, help="Load it with the installed transformers, in a child process.")
@plan_options
@_quiet
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
    name, size = Path(directory).name, _size_of(directory)
    with progress_bar(size, quiet=quiet or as_json, label=name, phase="verifying") as progress:
        verdict = shardmerge.verify(
            directory,
            sources=sources,
            reference=reference,
            load=load,
            options=parsed(given),
            progress=progress,
        )
    if as_json:
        found = {"checks": list(verdict.checks), "unchecked": list(verdict.unchecked), "tensors": verdict.tensors}
        click.echo(dumped({"ok": True, **found}))
        return
    for check in verdict.checks:
        click.echo(f"ok  {check}")
    for rest in verdict.unchecked:
        click.echo(f"not checked  {rest}")
    if verdict.unchecked:
        click.echo("hint: --sources MAPPING makes every tensor again and compares all bytes", err=True)


@cli.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@json_option
def diff(a: str, b: str, as_json: bool) -> NoReturn:
    """Compare two checkpoints of any format: names, types, shapes, values. Exit code 3 if they differ."""
    found = list(shardmerge.diff(a, b))
    if as_json:
        rows = [{"name": d.name, "what": d.what, "detail": d.detail} for d in found]
        click.echo(dumped({"equal": not found, "differences": rows}))
    else:
        for difference in found:
            click.echo(f"{difference.name}: {difference.what}: {difference.detail}")
        click.echo(f"{len(found)} differences" if found else "equal")
    sys.exit(3 if found else 0)


@cli.group()
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
@click.argument("name")
def presets_show(name: str) -> None:
    """Print a preset as it is written, to read or to copy from."""
    from shardmerge import api

    click.echo(api.preset_text(name), nl=False)


add_commands(cli)
add_cluster_commands(cli)
cli.add_command(bench)


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
        click.echo(explain.plan_text(prepared.plan, prepared.how, str(out or "(no output path)"), cloned))


def _warn(prepared: Prepared, *, machine: bool = False) -> None:
    for warning in prepared.plan.warnings:
        warn(warning, machine=machine)


def _carry_out(prepared: Prepared, out: Path, options: Options, *, quiet: bool, as_json: bool, log_json: bool) -> None:
    from shardmerge import api
    from shardmerge.plan import explain

    _warn(prepared, machine=log_json)
    started = time.monotonic()
    total = sum(tensor.nbytes for tensor in prepared.plan.tensors())
    with progress_bar(total, quiet=quiet or as_json, label=out.name, machine=log_json) as progress:
        result = api.carry_out(prepared, out, options, progress)
    seconds = time.monotonic() - started
    if as_json:
        click.echo(dumped(_result_json(result, prepared, seconds)))
        return
    if options.device == "cuda":
        warn("the planned peak does not count what torch and CUDA take", machine=log_json)
    for name, count in sorted(result.outcome.overflows.items()):
        warn(f"{count:,} values of {name} overflowed in the cast", machine=log_json)
    if not quiet:
        click.echo(explain.plan_text(result.plan, prepared.how, str(out), result.outcome.bytes_cloned))
        click.echo(_said(result, seconds))
        for rest in result.records.unchecked():
            click.echo(f"not checked  {rest}")


def _said(result: Result, seconds: float) -> str:
    kept = len(result.plan.shards) - result.made
    if not result.made:
        return (
            "all of it was made before: published" if result.outcome.checksums else "published already: nothing to do"
        )
    rate = (result.outcome.bytes_written + result.outcome.bytes_cloned) / max(seconds, 1e-9) / 1e9
    before = f"; {kept} of {len(result.plan.shards)} files were made before" if kept else ""
    return f"written in {seconds:.1f} s ({rate:.2f} GB/s){before}"


def _result_json(result: Result, prepared: Prepared, seconds: float) -> dict[str, object]:
    from shardmerge.plan import explain
    from shardmerge.plan.clones import moved

    return {
        "path": str(result.path),
        "plan": result.plan.id,
        "tensors": sum(1 for _ in result.plan.tensors()),
        "total_size": result.plan.tensor_bytes,
        "parts_made": result.made,
        "bytes_read": result.outcome.bytes_read,
        "bytes_written": result.outcome.bytes_written,
        **explain.moved_json(moved(result.plan, result.outcome.bytes_cloned)),
        "clone_seconds": round(result.outcome.clone_seconds, 6),
        "overflows": result.outcome.overflows,
        "source_records": asdict(result.records),
        "warnings": list(result.plan.warnings),
        "checks": list(result.plan.checks),
        "notes": {source.name: list(source.notes) for source in result.plan.sources if source.notes},
        "planned_peak": prepared.how.peak,
        "seconds": round(seconds, 3),
    }


def _size_of(directory: str) -> int:
    folder = Path(directory)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0


# What ends a run cleanly: Ctrl-C; Slurm and Kubernetes send SIGTERM, a time limit with a warning SIGUSR1, a terminal
# that closes SIGHUP.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def _stop(signum: int, frame: FrameType | None) -> None:
    """The same clean stop for all, and once: Slurm says it twice, and a second one would end the ending."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Runs the command line and turns what happened into an exit code; no traceback reaches a user."""
    # numpy's BLAS would start a thread a CPU when it is loaded; products are made by one (`ops.blas`).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for number in _STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _stop)
    # What a command builds lives until it ends; looking for cycles in it took 7 ms of a start, for 0.5 MB of garbage.
    gc.disable()
    code = _guarded()
    if code in (InterruptedRunError.exit_code, PublishedError.exit_code):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread may be waiting for the disk, and nothing it does counts any more
    sys.exit(code)


def _guarded() -> int:
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `shardmerge inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the last resort: a bug is ours, and says so
        return _failed(error)
    return code if isinstance(code, int) else 0


def _failed(error: BaseException) -> int:
    """Says on stderr what happened, and on stdout where JSON was asked for; returns the exit code."""
    if isinstance(error, click.ClickException):
        error.show()
        return _answered(UsageError("bad-usage", error.format_message()), error.exit_code)
    found = _as_ours(error)
    click.echo("\n".join(f"error: {text}" for text in _blocks(found)), err=True)
    return _answered(found, _INTERNAL_ERROR if found.code == "internal-error" else found.exit_code)


def _as_ours(error: BaseException) -> ShardmergeError:
    """Returns what happened as an error that a user can act on."""
    if isinstance(error, InterruptedRunError) and not error.hint:
        error.hint = _again()
    if isinstance(error, ShardmergeError):
        return error
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return InterruptedRunError("interrupted", "interrupted", hint=_again())
    if os.environ.get("SHARDMERGE_TRACEBACK"):
        raise error
    if isinstance(error, OSError):
        where = str(error.filename or "")
        return ResourceError("system-error", f"the system refused: {error.strerror or error}", where=where)
    what = f"this is a bug in shardmerge: {type(error).__name__}: {error}"  # the last resort
    hint = "set SHARDMERGE_TRACEBACK=1, run it again, and report what it prints"
    return ShardmergeError("internal-error", what, hint=hint)


def _again() -> str:
    """Returns the line that goes on where this command was."""
    import shlex

    return f"to go on: shardmerge {shlex.join(sys.argv[1:])}"


def _answered(error: ShardmergeError, code: int) -> int:
    """Answers a command that was asked for JSON with its errors as JSON; people read them on stderr all the same."""
    if "--json" in sys.argv[1:]:
        click.echo(dumped({"ok": False, "exit_code": code, "errors": [one.fields() for one in error.each()]}))
    return code


def _blocks(error: ShardmergeError) -> list[str]:
    from shardmerge.cli.snippets import error_lines

    return ["\n".join(error_lines(single)) for single in error.each()]
