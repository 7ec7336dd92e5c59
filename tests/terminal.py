"""A real terminal of a given width, and what a command shows in it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

# Cursor movements and colours: ECMA-48 control sequences.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_terminal(
    *arguments: object,
    columns: int = 80,
    code: int = 0,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = ("-m", "shardmerge"),
) -> str:
    """Runs the command line with stdout and stderr on a terminal and returns all that it writes there."""
    command = [sys.executable, *program, *map(str, arguments)]
    return program_in_terminal(command, columns=columns, code=code, env={**os.environ, **(env or {})}, kept=env or {})


def program_in_terminal(
    command: Sequence[str],
    *,
    columns: int,
    env: Mapping[str, str],
    kept: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    code: int = 0,
) -> str:
    """Runs any program on a terminal; of what decides colours and width, only what is ``kept`` is handed on."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    without = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TERM"}
    clean = {name: text for name, text in env.items() if name not in without}
    ran = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env={**clean, "TERM": "xterm", **(kept or {})}
    )
    os.close(slave)
    shown = bytearray()
    try:
        while data := os.read(master, 1 << 16):
            shown += data
    except OSError:  # nobody holds the other end any more
        pass
    os.close(master)
    assert ran.wait() == code, shown.decode()
    return shown.decode().replace("\r\n", "\n")


def plain(shown: str) -> str:
    """What a terminal showed, without colours and movements."""
    return CONTROL.sub("", shown)
