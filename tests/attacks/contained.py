"""Runs commands of shardmerge, each in a process of its own, and says what it did: exit codes, time, memory, events.

The processes are forked from one that has imported every module of shardmerge, so that an import they make is one that
a file asked for. ``python -m tests.attacks.contained`` reads a list of lists of commands as JSON and writes
an ``Outcome`` a line.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import select
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import shardmerge
from shardmerge.cli.main import main
from tests.attacks import seeds

# Only a net below the checks, which compare what was measured: a process that would take all there is.
MOST_SECONDS, _MOST_MEMORY = 8, 1 << 30
# What runs code, or reaches outside of the process.
_EVENTS = (
    "exec", "import", "marshal.", "pickle.", "code.", "ctypes.dlopen", "subprocess.",
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "socket.", "pty.",
    "webbrowser.", "urllib.", "ftplib.", "http.",
)  # fmt: skip
# What Python itself imports when it is first needed.
_LATE = ("encodings.utf_8_sig", "encodings.idna", "encodings.latin_1", "encodings.ascii", "difflib", "shlex")
# Started by themselves, or made for a program that has torch.
_OF_TORCH = ("__main__", ".feeds")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the commands of one case did: exit codes, error codes, CPU seconds, peak MiB, audit events, last lines."""

    codes: list[int]
    seconds: float
    mebibytes: float
    events: list[str]
    said: str


def import_all() -> None:
    """Imports every module of shardmerge, and what these import when they need it."""
    for module in _LATE:
        importlib.import_module(module)
    for module in pkgutil.walk_packages(shardmerge.__path__, "shardmerge."):
        if not module.name.endswith(_OF_TORCH):
            importlib.import_module(module.name)


def rehearse() -> None:
    """Converts a sound file, so that what Python and numpy import at their first use is there."""
    with TemporaryDirectory() as folder, TemporaryFile() as said:
        source = Path(folder, "model.safetensors")
        source.write_bytes(seeds.WEIGHTS)
        kept = os.dup(1), os.dup(2)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        for command in (["inspect", str(source)], ["convert", str(source), f"{folder}/out", "--no-sync"]):
            assert _code(command) == 0
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)


class _Watch:
    """An audit hook: notes what runs code, and files opened for writing outside of the directories that may be."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed = tuple(allowed)
        self.seen: list[str] = []
        self.on = False

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        own = event == "ctypes.dlopen" and args[0] is None  # the process itself, for functions of the C library
        if self.on and not own and (event.startswith(_EVENTS) or (event == "open" and self._writes(args))):
            self.seen.append(f"{event} {str(args[0])[:80] if args else ''}")

    def _writes(self, args: tuple[object, ...]) -> bool:
        path, _, flags = args
        return bool(isinstance(flags, int) and flags & _WRITING and not str(path).startswith(self.allowed))


def outcomes(cases: Sequence[Sequence[Sequence[str]]], allowed: Sequence[str]) -> Iterator[Outcome]:
    """Yields what the commands of each case did; ``allowed`` are the directories that may be written to."""
    watch = _Watch(allowed)
    sys.addaudithook(watch)
    for commands in cases:
        yield _forked(commands, watch)


def _forked(commands: Sequence[Sequence[str]], watch: _Watch) -> Outcome:
    with TemporaryFile() as said, TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            _run(commands, watch, said.fileno(), told.fileno())
        _wait(child)
        _, status, used = os.wait4(child, 0)
        said.seek(0)
        told.seek(0)
        lines = said.read().decode("utf-8", "replace").strip()[-20_000:]
        found = json.loads(told.read() or "[[], []]")
    if os.WIFSIGNALED(status):
        found[0].append(-os.WTERMSIG(status))
    elif len(found[0]) < len(commands):
        found[0].append(70)
    return Outcome(found[0], used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, found[1], lines)


def _wait(child: int) -> None:
    """Waits for the process, and ends one that waits for something itself."""
    descriptor = os.pidfd_open(child)
    waiting = select.poll()  # and no select, which takes no descriptor above 1,023
    waiting.register(descriptor, select.POLLIN)
    if not waiting.poll(2_000 * MOST_SECONDS):
        os.kill(child, 9)
    os.close(descriptor)


def _run(commands: Sequence[Sequence[str]], watch: _Watch, said: int, told: int) -> None:
    mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MOST_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS,) * 2)
    os.dup2(said, 1)
    os.dup2(said, 2)
    codes = []
    watch.on = True
    for command in commands:
        codes.append(_code(command))
        os.pwrite(told, json.dumps([codes, watch.seen[:20]]).encode(), 0)
    os._exit(0)


def _code(command: Sequence[str]) -> int:
    try:
        sys.argv = ["shardmerge", *command]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def answer() -> None:
    """Reads cases and writes outcomes."""
    import_all()
    rehearse()
    asked = json.load(sys.stdin)
    for one in outcomes(asked["cases"], asked["allowed"]):
        print(json.dumps(asdict(one)), flush=True)


if __name__ == "__main__":
    answer()
