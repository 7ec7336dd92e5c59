"""The command that explains error codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from shardmerge.cli.colour import bold
from shardmerge.cli.completing import complete_code
from shardmerge.cli.options import dumped, json_option
from shardmerge.errors import UsageError

if TYPE_CHECKING:
    from shardmerge.cli.error_codes import ErrorCode

_INDENT = 26


@click.command()
@click.argument("code", required=False, shell_complete=complete_code)
@json_option
def errors(code: str | None, as_json: bool) -> None:
    """Explain an error CODE, the word in brackets at the end of a message; or list all codes."""
    from shardmerge.cli.error_codes import error_codes

    known = error_codes()
    found = [_known(code, known)] if code else list(known.values())
    if as_json:
        rows = [{"code": one.code, "group": one.group, "about": one.about, "do": one.do} for one in found]
        click.echo(dumped({"codes": rows}))
    elif code:
        click.echo(_explained(found[0]))
    else:
        click.echo(_table(found))


def _known(text: str, known: dict[str, ErrorCode]) -> ErrorCode:
    import difflib

    code = text.strip("[]").lower()
    if code not in known:
        near = difflib.get_close_matches(code, known, 1)
        hint = f"did you mean `{near[0]}`?" if near else "`shardmerge errors` lists all codes"
        raise UsageError("unknown-code", f"there is no error code `{text}`", hint=hint)
    return known[code]


def _explained(one: ErrorCode) -> str:
    texts = (_wrapped(one.about, ""), _wrapped(one.do, ""))
    return "\n\n".join((f"{bold(one.code)} ({one.group})", *texts))


def _table(found: list[ErrorCode]) -> str:
    lines: list[str] = []
    for group in dict.fromkeys(one.group for one in found):
        lines += ["", bold(group)] if lines else [bold(group)]
        lines += [_row(one) for one in found if one.group == group]
    return "\n".join(lines)


def _row(one: ErrorCode) -> str:
    return f"  {one.code:<{_INDENT - 4}}  {_wrapped(one.about, ' ' * _INDENT).lstrip()}"


def _wrapped(text: str, indent: str) -> str:
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
