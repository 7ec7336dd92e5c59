"""Every error of the system, at every call: ``python -m tests.every_error`` writes ``tests/soak/errors.json``.

A conversion of each of three checkpoints (safetensors, DeepSpeed ZeRO-3, DCP) is run once undisturbed. Then each of its
calls that looks at, reads or changes a file fails in turn, with each error that such a call has, once or from then on.
After each the output path is absent or holds the right result, the sources are untouched, the exit code is 0, 1, 4 or
6, the error names the file and what to do, and the same command then gives the right result and leaves nothing beside.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from tests.conftest import GOLDEN
from tests.faults import tool
from tests.killing import FAIL, Call, Machine, Ran, Trap, machine

RESULTS = Path(__file__).parent / "soak" / "errors.json"

FIXTURES = {
    "safetensors": GOLDEN / "xtuner" / "base_llm",
    "ZeRO-3": GOLDEN / "zero" / "llama_z3_w2_bf16" / "ckpt",
    "DCP": GOLDEN / "dcp" / "placements_2x2_fp32" / "ckpt",
}

_ANYWHERE = ("EIO", "ESTALE", "EACCES", "EINTR")
_OF_NAMES = ("ENAMETOOLONG",)
_OF_DESCRIPTORS = ("EMFILE",)
_OF_WRITING = ("ENOSPC", "EDQUOT", "EROFS")
# Also from some call on, for good.
_LASTING = ("EIO", "ENOSPC")
_LOOKS = ("stat", "access", "readlink", "statvfs")
_OPENS = ("open", "open-read", "opendir", "tmpfile")
_NAMES = (*_LOOKS, *_OPENS, "mkdir", "rename", "exchange", "unlink", "rmdir", "link", "chmod", "utimens")
_WRITES = (
    "open", "tmpfile", "write", "pwrite", "ftruncate", "fsync", "sync_file_range", "rename", "exchange", "mkdir",
    "unlink", "rmdir", "link", "chmod", "utimens", "close",
)  # fmt: skip


def errors_of(call: str) -> tuple[str, ...]:
    """Returns the errors that a call can fail with, by their names."""
    found = _ANYWHERE
    for errors, calls in ((_OF_NAMES, _NAMES), (_OF_DESCRIPTORS, _OPENS), (_OF_WRITING, _WRITES)):
        found += errors if call in calls else ()
    return found


@dataclass(frozen=True)
class Fault:
    """An error at a call.

    Attributes
    ----------
    at
        Which call, from 1.
    call
        Its name.
    error
        The name of the error.
    lasting
        Whether every later call fails too.
    """

    at: int
    call: str
    error: str
    lasting: bool = False

    def trap(self, under: Path) -> Trap:
        until = 1_000_000 if self.lasting else 0
        return Trap(FAIL, at=self.at, until=until, number=getattr(errno, self.error), under=str(under))


class Wrong(AssertionError):
    """Something that may never be."""


class Conversion:
    """A conversion of one fixture, in a place of its own."""

    def __init__(self, root: Path, source: Path, runs: Machine) -> None:
        self.root, self._runs = root, runs
        self.place, self.source = root / "place", root / "in"
        shutil.copytree(source, self.source)
        self._before = _looked_at(self.source)
        ran = self._run()
        assert ran.code == 0, ran.err
        self.golden = _files(self.out)
        self._begin()
        assert self._run(Trap(under=str(root))).code == 0
        self.calls: list[Call] = list(runs.calls)
        assert _files(self.out) == self.golden

    @property
    def out(self) -> Path:
        return self.place / "out"

    def faults(self) -> Iterator[Fault]:
        """Yields every error at every call."""
        for at, call in enumerate(self.calls, 1):
            for error in errors_of(call.name):
                yield Fault(at, call.name, error)
                if error in _LASTING:
                    yield Fault(at, call.name, error, lasting=True)

    def outcome(self, fault: Fault) -> str:
        """Runs under a fault, then again; returns what became of it, or raises ``Wrong``."""
        self._begin()
        ran = self._run(fault.trap(self.root))
        if not self._runs.hit:
            raise Wrong("the fault was not met")
        code = self._judged(ran)
        if ran.code and any(self.place.iterdir()):  # else all is as it was before the run, or as it is to be
            again = self._run()
            if again.code or _files(self.out) != self.golden:
                raise Wrong(f"the same command does not go on: exit {again.code}: {again.err}")
        beside = [path.name for path in self.place.iterdir() if path != self.out]
        if beside:
            raise Wrong(f"left behind: {beside}")
        return f"exit {ran.code} {code}".rstrip()

    def _judged(self, ran: Ran) -> str:
        if _looked_at(self.source) != self._before:
            raise Wrong("a source was touched")
        there = _files(self.out) if self.out.exists() else None
        if "Traceback" in ran.err or ran.code not in (0, 1, 4, 6):
            raise Wrong(f"exit {ran.code}: {ran.err}")
        if there != (self.golden if ran.code in (0, 6) else None):
            raise Wrong(f"exit {ran.code}, and at the output path: {sorted(there or ())}: {ran.err}")
        if not ran.code:
            return ""
        error = ran.json()["errors"][0]
        for field in ("where", "hint", "what"):
            if not error[field]:
                raise Wrong(f"the error has no {field}: {ran.err}")
        return str(error["code"])

    def _begin(self) -> None:
        if self.place.exists():
            shutil.rmtree(self.place)
        self.place.mkdir()

    def _run(self, trap: Trap | None = None) -> Ran:
        try:
            return self._runs.run("convert", self.source, self.out, "--workers", "1", "--json", trap=trap)
        except json.JSONDecodeError as error:
            raise RuntimeError(f"{self.source}: a run does not end: {trap}") from error


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _looked_at(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        found[str(path)] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode
    return found


# --- all of them ---


@dataclass
class Tried:
    """What became of the faults of one fixture.

    Attributes
    ----------
    calls
        How many calls a run makes.
    faults
        How many faults there are.
    outcomes
        How often a call with an error came to an outcome.
    wrong
        What may never be.
    """

    calls: int
    faults: int
    outcomes: Counter[tuple[str, str, str]]
    wrong: list[str]


def tried(name: str, base: Path, every: int = 1, minutes: float = inf) -> Tried:
    """Tries every n-th fault of a fixture, in an order that time may cut short."""
    latest = time.monotonic() + 60 * minutes
    with machine(base / "machine", tool("gcc")) as runs:
        conversion = Conversion(base / "scene", FIXTURES[name], runs)
        faults = list(conversion.faults())
        found = Tried(len(conversion.calls), len(faults), Counter(), [])
        for fault in random.Random(0).sample(faults[::every], len(faults[::every])):
            if time.monotonic() > latest:
                break
            try:
                found.outcomes[fault.call, fault.error, conversion.outcome(fault)] += 1
            except AssertionError as error:
                found.wrong.append(f"{name} {fault} {conversion.calls[fault.at - 1].a}\n    {error}")
                print(found.wrong[-1], flush=True)
    return found


def main() -> None:
    """Tries all, or every n-th, and writes what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only every n-th fault; then nothing is written")
    parser.add_argument("--minutes", type=float, default=inf, help="stop after so long")
    given = parser.parse_args()
    many = partial(tried, every=given.every, minutes=given.minutes)
    base = Path(tempfile.mkdtemp(prefix="shardmerge-errors-", dir="/dev/shm"))
    try:
        with ThreadPoolExecutor() as pool:
            found = dict(zip(FIXTURES, pool.map(lambda name: many(name, _made(base / name)), FIXTURES), strict=True))
    finally:
        shutil.rmtree(base)
    for name, one in found.items():
        print(f"{name}: {one.calls} calls, {one.outcomes.total()} of {one.faults} faults, {len(one.wrong)} wrong")
    wrong = any(one.wrong for one in found.values())
    if given.every == 1:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(_result(found), indent=1) + "\n")
    raise SystemExit(wrong)


def _made(folder: Path) -> Path:
    (folder / "machine").mkdir(parents=True)
    (folder / "scene").mkdir()
    return folder


def _result(found: Mapping[str, Tried]) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = [
        {"fixture": name, "call": call, "error": error, "outcome": outcome, "count": count}
        for name, one in found.items()
        for (call, error, outcome), count in sorted(one.outcomes.items())
    ]
    counts = {
        name: {
            "calls": one.calls,
            "faults": one.faults,
            "tried": one.outcomes.total() + len(one.wrong),
            "wrong": len(one.wrong),
        }
        for name, one in found.items()
    }
    return {"date": date, "kernel": os.uname().release, "fixtures": counts, "rows": rows}


if __name__ == "__main__":
    main()
