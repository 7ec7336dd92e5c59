"""Commands in a terminal, recorded as pictures: what is typed and printed, in colour, as SVG that needs no script.

The terminal is a real one (a pty) of a given width, and an emulator keeps its screen, so that a progress line that is
written over is seen as a person sees it. A picture is the last screen; a recording shows the screens in turn.
"""

from __future__ import annotations

import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fcntl import ioctl
from html import escape
from itertools import groupby
from pathlib import Path

import pyte

# A run of cells of one look: its text, its colour (a class), whether it is bold.
Span = tuple[str, str, bool]
Screen = tuple[tuple[Span, ...], ...]

_CELL, _LINE, _PAD, _BAR = 8.43, 18, 16, 30
# The colours of a terminal by the names that the emulator gives them, for dark ground and for light.
_COLOURS = {
    "red": ("#ff7b72", "#cf222e"),
    "green": ("#56d364", "#116329"),
    "brown": ("#e3b341", "#7d4e00"),
    "blue": ("#79c0ff", "#0550ae"),
    "magenta": ("#d2a8ff", "#8250df"),
    "cyan": ("#76e3ea", "#1b7c83"),
    "brightblack": ("#8b949e", "#6e7781"),
}


@dataclass(frozen=True, slots=True)
class Frame:
    """A screen, and the second at which it appeared."""

    second: float
    screen: Screen


class Recorder:
    """Types commands into a terminal and keeps the screens.

    Parameters
    ----------
    columns, rows
        The size of the terminal, in characters.
    folder
        Where the commands run; it is shown as ``~/llava``.
    environment
        What is set besides.
    """

    def __init__(self, columns: int, rows: int, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self._screen)
        self._folder = folder
        self._environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **(environment or {})}
        self._environment.pop("NO_COLOR", None)
        self._size = struct.pack("HHHH", rows, columns, 0, 0)
        self._began = time.monotonic()
        self.frames: list[Frame] = []

    def say(self, text: str) -> None:
        """Shows a line that no command printed."""
        self._show(f"\x1b[90m{text}\x1b[0m\n")

    def run(self, shown: str, arguments: Sequence[str]) -> int:
        """Shows a command line, runs it, and returns its exit status."""
        self._show(f"\x1b[32m$\x1b[0m \x1b[1m{shown}\x1b[0m\n")
        ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, self._size)
        process = subprocess.Popen(
            arguments, cwd=self._folder, env=self._environment, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        for text in _read(ours, process):
            self._show(text.replace(str(self._folder), "~/llava"))
        os.close(ours)
        return process.wait()

    def _show(self, text: str) -> None:
        self._stream.feed(text)
        self.frames.append(Frame(time.monotonic() - self._began, _lines(self._screen)))


def shardmerge(*arguments: str) -> list[str]:
    """Returns the command line of shardmerge, as this interpreter runs it."""
    return [sys.executable, "-m", "shardmerge", *arguments]


def picture(frames: Sequence[Frame], columns: int, title: str) -> str:
    """Returns the last screen as SVG, without the empty lines below."""
    return _document([frames[-1]], columns, title)


def recording(frames: Sequence[Frame], columns: int, title: str, *, step: float = 0.12, hold: float = 4.0) -> str:
    """Returns the screens in turn, as SVG that a browser animates; where it does not, the last one is seen.

    Parameters
    ----------
    step
        Seconds: screens nearer to each other are shown as the later one.
    hold
        Seconds that the last one stays before it begins again.
    """
    kept = [
        frame
        for frame, after in zip(frames, [*frames[1:], None], strict=True)
        if after is None or after.second - frame.second >= step
    ]
    return _document(kept, columns, title, hold=hold)


def _read(descriptor: int, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yields what a process prints, in pieces as they come."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    while True:
        if waiting.poll(50):  # milliseconds
            try:
                data = os.read(descriptor, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            yield data.decode("utf-8", "replace").replace("\r\n", "\n")
        elif process.poll() is not None:
            return


def _lines(screen: pyte.Screen) -> Screen:
    lines = []
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        spans = tuple(
            ("".join(cell.data for cell in run), colour, bold)
            for (colour, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold))
        )
        lines.append(spans)
    return tuple(lines)


def _height(screen: Screen) -> int:
    used = [index for index, line in enumerate(screen) if any(text.strip() for text, _, _ in line)]
    return used[-1] + 1 if used else 1


def _document(frames: Sequence[Frame], columns: int, title: str, hold: float = 0.0) -> str:
    rows = max(_height(frame.screen) for frame in frames)
    width, height = columns * _CELL + 2 * _PAD, rows * _LINE + _PAD + _BAR
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>{_style()}{_motion(frames, hold) if hold else ''}</style>",
        f'<rect class="ground" width="{width:.0f}" height="{height:.0f}" rx="9"/>',
        *(f'<circle class="dot" cx="{18 + 18 * index}" cy="17" r="5"/>' for index in range(3)),
        f'<text class="title" x="{width / 2:.0f}" y="21" text-anchor="middle">{escape(title)}</text>',
    ]
    for number, frame in enumerate(frames):
        name = f' class="frame f{number}"' if hold else ""
        lines.append(f"<g{name}>")
        lines += [
            _line(line, row) for row, line in enumerate(frame.screen[:rows]) if any(t.strip() for t, _, _ in line)
        ]
        lines.append("</g>")
    return "\n".join([*lines, "</svg>", ""])


def _line(line: Sequence[Span], row: int) -> str:
    column, spans = 0, []
    for text, colour, bold in line:
        kind = " ".join(name for name, used in ((colour, colour in _COLOURS), ("b", bold)) if used)
        if text.strip():
            x = _PAD + column * _CELL
            spans.append(
                f'<tspan x="{x:.1f}" textLength="{len(text.rstrip()) * _CELL:.1f}"'
                f"{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text.rstrip())}</tspan>"
            )
        column += len(text)
    return f'<text y="{_BAR + _LINE * (row + 0.8):.1f}" xml:space="preserve">{"".join(spans)}</text>'


def _style() -> str:
    dark = "".join(f".{name}{{fill:{colour}}}" for name, (colour, _) in _COLOURS.items())
    light = "".join(f".{name}{{fill:{colour}}}" for name, (_, colour) in _COLOURS.items())
    return (
        "text{font:14px ui-monospace,SFMono-Regular,Menlo,'DejaVu Sans Mono',Consolas,monospace;fill:#1f2328}"
        ".ground{fill:#f6f8fa;stroke:#d0d7de}.dot{fill:#d0d7de}"
        ".title{font:12px sans-serif;fill:#6e7781}.b{font-weight:bold}"
        f"{light}"
        "@media (prefers-color-scheme: dark){text{fill:#e6edf3}.ground{fill:#0d1117;stroke:#30363d}.dot{fill:#30363d}"
        f".title{{fill:#8b949e}}{dark}}}"
    )


def _motion(frames: Sequence[Frame], hold: float) -> str:
    """Each screen is seen from its second until that of the next; the last one to the end."""
    total = frames[-1].second + hold
    rules = [
        ".frame{visibility:hidden}.frame:last-of-type{visibility:visible}"
        "@media print,(prefers-reduced-motion: reduce){.frame{animation:none!important}}"
    ]
    for number, frame in enumerate(frames):
        begin = 100 * frame.second / total
        end = 100 * frames[number + 1].second / total if number + 1 < len(frames) else 100.0
        stops = f"0%{{visibility:{'visible' if begin == 0 else 'hidden'}}}{begin:.2f}%{{visibility:visible}}"
        stops += (
            f"{end:.2f}%{{visibility:hidden}}100%{{visibility:hidden}}" if end < 100 else "100%{visibility:visible}"
        )
        rules.append(f"@keyframes k{number}{{{stops}}}.f{number}{{animation:k{number} {total:.2f}s step-end infinite}}")
    return "".join(rules)
