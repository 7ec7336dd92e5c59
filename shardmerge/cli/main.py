"""The command line. stdout is the answer, stderr is progress, warnings and errors."""

from __future__ import annotations

import gc
import os
import signal
import sys

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
from shardmerge.cli.failing import failed
from shardmerge.cli.mappings import add_commands
from shardmerge.cli.presets import presets
from shardmerge.cli.report import report
from shardmerge.cli.stopping import cause_of, listen, listen_no_more
from shardmerge.errors import InterruptedRunError, PublishedError


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


def main() -> None:
    """Runs the command line and turns what happened into an exit code; no traceback reaches a user."""
    # numpy's BLAS would start a thread a CPU when it is loaded; products are made by one (`ops.blas`).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    listen()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it hands that on, and never sees how a child ended
    # What a command builds lives until it ends; looking for cycles in it took 7 ms of a start, for 0.5 MB of garbage.
    gc.disable()
    code = _guarded()
    listen_no_more()
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
        return failed(cause_of(error))
    return code if isinstance(code, int) else 0
