"""What a command says that failed, and with which exit code."""

from __future__ import annotations

import io
import os
import sys

import click

from shardmerge.cli import colour
from shardmerge.cli.options import dumped
from shardmerge.errors import InterruptedRunError, ResourceError, ShardmergeError, UsageError
from shardmerge.system_errors import advice, no_memory

_INTERNAL_ERROR = 70

# What the dynamic loader says of a library for which there is no address space; numpy quotes it.
_NOT_LOADED = "failed to map segment"


def failed(error: BaseException) -> int:
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
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and _NOT_LOADED in str(error)):
        return no_memory()
    if isinstance(error, OSError):
        what = f"the system refused: {error.strerror or error}"
        where = error.filename or ("." if isinstance(error, FileNotFoundError) else "")  # see advice
        return ResourceError("system-error", what, where=str(where), hint=advice(error))
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
