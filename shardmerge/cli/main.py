"""The command line. stdout is the answer, stderr is progress, warnings and errors."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from types import FrameType

import click

import shardmerge
from shardmerge.cli import colour
from shardmerge.cli.bench import bench
from shardmerge.cli.checkpoints import add_checkpoint_commands
from shardmerge.cli.cluster import add_cluster_commands
from shardmerge.cli.completing import completion
from shardmerge.cli.conversions import add_conversion_commands
from shardmerge.cli.errors import errors
from shardmerge.cli.examples import add_examples
from shardmerge.cli.mappings import add_commands
from shardmerge.cli.options import dumped
from shardmerge.cli.presets import presets
from shardmerge.cli.report import report
from shardmerge.errors import InterruptedRunError, PublishedError, ResourceError, ShardmergeError, UsageError

_INTERNAL_ERROR = 70


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(shardmerge.__version__, prog_name="shardmerge")
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Default: in a terminal, unless NO_COLOR is set; FORCE_COLOR sets it everywhere.",
)
def cli(color: str) -> None:
    """Turns training checkpoints into Hugging Face models, tensor by tensor, in a few dozen MB of memory.

    \b
    shardmerge run mapping.yaml         what the mapping says
    shardmerge plan mapping.yaml        all of it, without reading data
    shardmerge convert global_step500/ out/ --dtype bfloat16
    shardmerge inspect work_dirs/iter_5198.pth
    """  # noqa: D301  # \b is click's mark for "leave these lines as they are"
    colour.choose(color)


add_conversion_commands(cli)
add_checkpoint_commands(cli)
add_commands(cli)
add_cluster_commands(cli)
cli.add_command(presets)
cli.add_command(report)
cli.add_command(bench)
cli.add_command(errors)
cli.add_command(completion)
add_examples(cli)


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
        said = io.StringIO()
        error.show(said)
        colour.echo(said.getvalue().rstrip(), err=True)
        return _answered(UsageError("bad-usage", error.format_message()), error.exit_code)
    found = _as_ours(error)
    colour.echo("\n".join(f"error: {text}" for text in _blocks(found)), err=True)
    if sys.stderr.isatty() and not {"-q", "--quiet"} & set(sys.argv[1:]):
        click.echo(_more_about(found), err=True)
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
        from shardmerge.cli.snippets import place

        rows = [{**one.fields(), **place(one.where)} for one in error.each()]
        click.echo(dumped({"ok": False, "exit_code": code, "errors": rows}))
    return code


def _more_about(error: ShardmergeError) -> str:
    """Returns the line below the last error in a terminal, as rustc has it."""
    codes = list(dict.fromkeys(one.code for one in error.each()))
    more = f", for CODE in {', '.join(codes)}" if len(codes) > 1 else ""
    return f"explain: shardmerge errors {'CODE' if more else codes[0]}{more}"


def _blocks(error: ShardmergeError) -> list[str]:
    from shardmerge.cli.snippets import error_lines

    return ["\n".join(error_lines(single)) for single in error.each()]
