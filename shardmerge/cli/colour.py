"""The terminal: how wide it is, whether text has colour, and which: errors red, warnings yellow, hints cyan.

``--color always`` and ``never`` decide. Otherwise the conventions of https://no-color.org and
https://force-color.org hold; otherwise a terminal has colour, and a pipe or a file has none.
"""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from typing import TextIO

import click

from shardmerge.errors import escaped

# What is painted of a line, and how: SGR codes of ECMA-48. 1 is bold, 31 red, 32 green, 33 yellow, 36 cyan.
_RULES = (
    (re.compile(r"^[Ee]rror(?=: )"), "1;31"),
    (re.compile(r"^warning(?=: )"), "1;33"),
    (re.compile(r"(?:(?<=^)|(?<=^  ))(?:hint|note)(?=: )"), "1;36"),
    (re.compile(r"^ok(?=  )"), "1;32"),
    (re.compile(r"(?<= )\^+$"), "1;31"),  # below a line of a mapping
    (re.compile(r"(?<= )\^ differs(?=, )"), "1;33"),  # below a line of a tree of tensors
)
_BOLD = ("\x1b[1m", "\x1b[0m")
_OWN = re.compile(r"(\x1b\[[01]m)")
_chosen = ["auto"]


def choose(when: str) -> None:
    """Takes what ``--color`` says: ``auto``, ``always`` or ``never``."""
    _chosen[0] = when


def has_colour(stream: TextIO) -> bool:
    """Tells whether what is written to a stream has colour."""
    if _chosen[0] != "auto":
        return _chosen[0] == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def echo(text: str, *, err: bool = False) -> None:
    """Writes lines to stdout or stderr, the words that lead them in their colours where the stream has any.

    Names and texts of files are among them: what would steer a terminal is shown as an escape.
    """
    colour = has_colour(sys.stderr if err else sys.stdout)
    shown = text if text.replace("\n", "").isprintable() else "\n".join(map(_harmless, text.split("\n")))
    click.echo("\n".join(map(_painted, shown.split("\n"))) if colour else shown, err=err, color=colour)


def _harmless(line: str) -> str:
    """Returns a line of which only our own bold steers a terminal."""
    return "".join(part if part in _BOLD else escaped(part) for part in _OWN.split(line))


def _painted(line: str) -> str:
    for pattern, code in _RULES:
        line = pattern.sub(partial(_inked, code), line)
    return line


def _inked(code: str, found: re.Match[str]) -> str:
    return f"\x1b[{code}m{found[0]}\x1b[0m"


def bold(text: str) -> str:
    """Returns text for stdout, bold where stdout has colour."""
    return f"\x1b[1m{text}\x1b[0m" if has_colour(sys.stdout) else text


def columns() -> int:
    """Returns how wide the terminal is that stdout is, or 0 where it is none."""
    if not sys.stdout.isatty():
        return 0
    import shutil

    return shutil.get_terminal_size().columns
