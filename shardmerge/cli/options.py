"""Options that several commands share, and what they mean."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shardmerge.cli.completing import complete_dtype
from shardmerge.errors import UsageError

if TYPE_CHECKING:
    from shardmerge.api import Options

# click calls a path that may not be read wrong usage: whatever uses it says what the system refused, and what to do.
PATH = click.Path(readable=False)

_Command = TypeVar("_Command", bound=Callable[..., object])


def plan_options(function: _Command) -> _Command:
    """The options of everything that plans."""
    for option in reversed(
        [
            click.option(
                "--dtype",
                shell_complete=complete_dtype,
                help="Cast float tensors: bfloat16, float16, float32, ... Default: as stored.",
            ),
            click.option("--shard-size", "--max-shard-size", help="Most bytes in one file, decimal. Default: 5GB."),
            click.option(
                "--format",
                "form",
                type=click.Choice(["safetensors", "bin", "dcp", "zero-universal"]),
                help="Of the files of weights.",
            ),
            click.option(
                "--dcp-root", metavar="KEY", help="Of the model in a state dict. Default: model; '' for none."
            ),
            click.option(
                "--files",
                type=click.Choice(["model", "all", "none"]),
                help="Small files beside the weights that go along. Default: what is part of the model.",
            ),
            click.option("--max-memory", help="Memory budget of all processes. Default: 256MiB, or what is granted."),
            click.option("--workers", type=click.IntRange(1, 64), help="CPUs to use. Default: all that are granted."),
            click.option(
                "--partial", is_flag=True, help="Only a part of the model that config.json describes is wanted."
            ),
            click.option("--download", is_flag=True, help="Fetch hub ids that are not in the local cache."),
            click.option("--io", type=click.Choice(["pread", "mmap"]), default="pread", help="How to read."),
            click.option("--no-sync", is_flag=True, help="Do not wait for the disk. Faster; a power cut may lose it."),
        ]
    ):
        function = option(function)
    return function


def closeness_options(function: _Command) -> _Command:
    """What counts as equal."""
    for option in reversed(
        [
            click.option("--rtol", type=float, default=0.0, help="Relative tolerance: |a - b| <= atol + rtol * |b|."),
            click.option("--atol", type=float, default=0.0, help="Absolute tolerance."),
            click.option(
                "--cast",
                metavar="DTYPE",
                shell_complete=complete_dtype,
                help="Cast floats of both sides first: bfloat16, float16, ...",
            ),
            click.option("--headers", is_flag=True, help="Names, types and shapes only; no data is read."),
        ]
    ):
        function = option(function)
    return function


def run_options(function: _Command) -> _Command:
    """The options of everything that writes a result."""
    for option in reversed(
        [
            click.option("--overwrite", is_flag=True, help="Replace a result of shardmerge at the output path."),
            click.option("--fresh", is_flag=True, help="Begin anew, instead of going on where a stopped run was."),
            click.option("--recheck", is_flag=True, help="Read all of what a stopped run made again, not samples."),
            click.option("--sha256", is_flag=True, help="Put the SHA-256 of every file and tensor into the receipt."),
        ]
    ):
        function = option(function)
    return function


def engine_options(function: _Command) -> _Command:
    """Who makes the files of a result."""
    for option in (
        click.option(
            "--address", help="Of a cluster of Ray: auto, HOST:6379, ray://HOST:10001. Default: what Ray finds."
        ),
        click.option(
            "--engine",
            type=click.Choice(["here", "ray"]),
            default="here",
            help="Who makes the files: processes here, or tasks of Ray.",
        ),
    ):
        function = option(function)
    return function


root_option = click.option(
    "--root", "roots", multiple=True, metavar="OLD=NEW", help="Where the files of a plan are now."
)
check_option = click.option(
    "--check",
    type=click.Choice(["transformers"]),
    help="Ask the installed transformers, before anything is written, whether it will load.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Where to cast. cuda: needs torch, whose memory the plan does not count.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Show the whole plan before it is carried out.")
log_json_option = click.option("--log-json", is_flag=True, help="Progress as lines of JSON on stderr, for machines.")
view_option = click.option(
    "--view",
    type=click.Choice(["fp32", "module"]),
    default="fp32",
    help="DeepSpeed: master weights or 16-bit.",
)
state_root_option = click.option("--root", default="", help="Dotted path of the state dict inside a torch file.")
strip_option = click.option(
    "--strip", multiple=True, metavar="PREFIX", help="Take a prefix off the names of SOURCE: module. May be repeated."
)
config_option = click.option(
    "--config",
    default="",
    metavar="DIR",
    type=PATH,
    help="Take config.json, tokenizer and so on from a directory or hub id.",
)
save_mapping_option = click.option(
    "--save-mapping",
    type=PATH,
    metavar="FILE",
    help="Write the mapping that makes the same result.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@dataclass(frozen=True, slots=True)
class Reporting:
    """What a run says: nothing, the usual lines, the whole plan too; as JSON for machines."""

    quiet: bool
    verbose: bool
    log_json: bool
    as_json: bool

    @classmethod
    def of(cls, quiet: bool, verbose: bool, log_json: bool, as_json: bool) -> Reporting:
        """Returns what the options say, or refuses ``--verbose`` where nothing is shown to people."""
        why = "shows the plan, and --quiet and --json show none"
        refuse_idle({"verbose": verbose and (quiet or as_json)}, "verbose", why=why)
        return cls(quiet, verbose, log_json, as_json)

    @property
    def silent(self) -> bool:
        """Whether people are told nothing on the way."""
        return self.quiet or self.as_json


def parsed(given: dict[str, Any]) -> Options:
    """Returns what the options of everything that plans say."""
    from shardmerge.api import Options

    return Options(
        dtype=given["dtype"] or None,
        shard_size=given["shard_size"] or None,
        format=given["form"],
        root=given["dcp_root"],
        optimizer=given.get("with_optimizer", False),
        memory=given["max_memory"] or None,
        workers=given["workers"],
        download=given["download"],
        io=given["io"],
        sync=not given["no_sync"],
        device=given.get("device", "cpu"),
        partial=given["partial"],
        files=given["files"],
        check=given.get("check"),
        engine=given.get("engine", "here"),
        address=given.get("address"),
        fresh=given.get("fresh", False),
        recheck=given.get("recheck", False),
        overwrite=given.get("overwrite", False),
        sha256=given.get("sha256", False),
    )


def refuse_idle(given: dict[str, Any], *names: str, why: str) -> None:
    """Refuses options that have no effect as the command is called."""
    spelt = {"form": "format"}
    idle = [f"--{spelt.get(name, name).replace('_', '-')}" for name in names if given.get(name)]
    if idle:
        raise UsageError("no-effect", f"{idle[0]} {why}", hint=f"leave {', '.join(idle)} out")


def refuse_idle_for_engine(given: dict[str, Any], part: str | None) -> None:
    """Refuses what has no effect with the engine that is asked for."""
    if given["engine"] == "here":
        refuse_idle(given, "address", why="is for --engine ray")
        return
    chosen = {"part": part, "device": given["device"] != "cpu"}
    refuse_idle(chosen, "part", "device", why="is not for --engine ray, whose tasks take whole files and use CPUs")


def refuse_idle_for_plan(path: str, given: dict[str, Any]) -> None:
    """Refuses what decides the bytes, where a plan has decided them."""
    if path.endswith(".json"):
        why = "is decided in the plan: give it to `shardmerge plan MAPPING --out PLAN`"
        refuse_idle(given, "dtype", "shard_size", "form", "dcp_root", "files", "partial", "check", "download", why=why)


def pair(text: str, option: str = "--base", example: str = "vision=clip/") -> tuple[str, str]:
    """Returns the two sides of ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(
            "bad-pair",
            f"{option} takes NAME=VALUE, not {text!r}",
            hint=f"{option} NAME={text.lstrip('=') or 'PATH'}, such as {option} {example}",
        )
    return name, value


def command_line(context: click.Context, *without: str) -> str:
    """Returns the command as it was called, without some of its options, for a shell."""
    import shlex

    words = ["shardmerge", str(context.info_name)]
    for option in context.command.params:
        name, value = str(option.name), context.params[str(option.name)]
        if context.get_parameter_source(name) != click.core.ParameterSource.COMMANDLINE or name in without:
            continue
        if isinstance(option, click.Argument):
            words.append(str(value))
        elif isinstance(option, click.Option) and option.is_flag:
            words.append(option.opts[-1])
        else:
            words += [word for one in (value if option.multiple else (value,)) for word in (option.opts[0], str(one))]
    return shlex.join(words)


def dumped(value: Mapping[str, object]) -> str:
    """Returns an answer as JSON text, its schema number first."""
    from shardmerge.json_rows import JSON_SCHEMA

    return json.dumps({"schema": JSON_SCHEMA, **value}, indent=2)


def write_lines(value: object) -> None:
    """Writes a value with rows as JSON to stdout, piece by piece."""
    from shardmerge.json_rows import lines

    sys.stdout.writelines(lines(value))
    sys.stdout.write("\n")
